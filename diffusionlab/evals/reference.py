"""Features of a data source, computed once and kept.

They lie in the cache under a name made of what decides them: the source with its
options, the number of examples, the network with the hash of its weights, and its
outputs. Beside them is a hash of some examples, evenly spaced; when the data give
another one later, the features are refused instead of used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from diffusionlab import multihost
from diffusionlab.evals import arrays, feature_store
from diffusionlab.features.base import Network, Room
from diffusionlab.types import Source

_BATCH = 64
_CHECKED = 64  # examples looked at before kept features are used


def of_source(
    source: Source,
    network: Network,
    outputs: Sequence[str],
    apply: Callable,
    room: Room,
    limit: int = 0,
) -> feature_store.Stored:
    """Returns the features of a source, from the cache where they are there.

    Args:
      source: examples 'x', and 'label' where there are classes.
      network: the feature network.
      outputs: of the network.
      apply: see `EvalContext`.
      room: says where the cache is.
      limit: examples at most, evenly spaced; 0 is all of them.

    Raises:
      ValueError: the data are not those of the kept features any more.
    """
    num = min(limit or len(source), len(source))
    indices = np.arange(num) * len(source) // num
    identity = json.dumps(
        {
            "source": _identity(source),
            "num": num,
            "network": network.about,
            "outputs": sorted(outputs),
        },
        sort_keys=True,
    )
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = room.cache / "references" / key
    name = f"{getattr(source, 'split', '')} data of {type(source).__name__}".strip()

    def batches(start):
        for first in range(start, num, _BATCH):
            found = arrays.take(source, indices[first : first + _BATCH])
            yield found["x"], found.get("label")

    with _alone(folder.with_suffix(".lock")):
        multihost.on_main(
            f"check {name}", lambda: _check(folder, source, indices, name), room.timeout
        )
        feature_store.fill(
            folder,
            batches,
            num,
            network,
            outputs,
            apply,
            name=name,
            identity=identity,
            timeout=room.timeout,
        )
    return feature_store.Stored(
        folder,
        name,
        feature_store.class_names(source.spec),
        lambda which: arrays.take(source, indices[np.asarray(which)])["x"],
    )


def _identity(source: Source) -> str:
    """The source with its options; of one that is no dataclass, what can be seen."""
    kind = f"{type(source).__module__}:{type(source).__qualname__}"
    if dataclasses.is_dataclass(source):
        return f"{kind} {dataclasses.asdict(source)}"
    return f"{kind} {source.spec} {len(source)}"


def _check(folder: pathlib.Path, source: Source, indices, name: str) -> None:
    """Compares the data with those that were there when the store was begun."""
    chosen = indices[np.arange(min(_CHECKED, len(indices))) * len(indices) // _CHECKED]
    found = arrays.take(source, np.unique(chosen))
    label = found.get("label", np.zeros(len(found["x"])))
    digest = feature_store.chain("", np.asarray(found["x"], np.float32), label)
    file = folder / "examples.sha256"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(digest, encoding="utf-8")
    elif file.read_text(encoding="utf-8") != digest:
        raise ValueError(
            f"reference: the {name} are other ones than those whose features were "
            f"kept; remove '{folder}' to compute them anew."
        )


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
    """Waits while another program computes the same reference."""
    if not multihost.is_main():
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another program that computes {path.stem}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield
