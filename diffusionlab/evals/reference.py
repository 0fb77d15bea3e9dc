"""Features of a data source, computed once and kept.

They lie in the cache under a name made of what decides them: the source with its
options and a hash of its examples, the network with the hash of its weights, and its
outputs. A source that knows a `version` of its files is asked for that and for some
examples, evenly spaced; of others all examples are hashed, each time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np

from diffusionlab.evals import arrays, feature_store, scratch
from diffusionlab.features.base import Network, Room
from diffusionlab.types import Source

_BATCH = 64
_CHECKED = 64  # examples that are hashed where files have a version


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
    """
    num = min(limit or len(source), len(source))
    indices = np.arange(num) * len(source) // num
    name = f"{getattr(source, 'split', '')} data of {type(source).__name__}".strip()
    identity = json.dumps(
        {
            "source": _identity(source, indices),
            "num": num,
            "network": network.about,
            "outputs": sorted(outputs),
        },
        sort_keys=True,
    )
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = room.cache / "references" / key

    def batches(start):
        for first in range(start, num, _BATCH):
            found = arrays.take(source, indices[first : first + _BATCH])
            yield found["x"], found.get("label")

    with scratch.alone(folder.with_suffix(".lock"), name):
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


def _identity(source: Source, indices: np.ndarray) -> str:
    """The source with its options and its examples at `indices`."""
    kind = f"{type(source).__module__}:{type(source).__qualname__}"
    if dataclasses.is_dataclass(source):
        kind += f" {dataclasses.asdict(source)}"
    version = getattr(source, "version", "")
    if version:
        few = min(_CHECKED, len(indices))
        indices = indices[np.arange(few) * len(indices) // few]
    digest = ""
    for start in range(0, len(indices), _BATCH):
        found = arrays.take(source, indices[start : start + _BATCH])
        x = np.asarray(found["x"], np.float32)
        digest = feature_store.chain(digest, x, found.get("label", np.zeros(len(x))))
    return f"{kind} {version} {digest}"
