"""A small classifier of scikit-learn's digits: features that need no file.

It is trained on first use, in seconds, and kept: on all digits, so that those a run is
trained on and those it holds out are alike to it. Rounding differs between machines,
and so do its weights, in the last digits; their hash is in the provenance of every
number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.features.base import Network, Room
from diffusionlab.types import DataSpec

_SHAPE = (8, 8, 1)
_WIDTHS = (128, 64)
_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits:
    """A perceptron 64-128-64-10 with ReLU, trained on all 1,797 digits.

    Outputs: 'features', the 64 activations before the last layer, and 'logits', 10.
    """

    outputs = ("features", "logits")

    def check(self, spec: DataSpec) -> None:
        """Raises ValueError for data that are not `[8, 8, 1]`."""
        if spec.shape != _SHAPE:
            raise ValueError(
                f"name: the extractor 'digits' takes images {_SHAPE}, and the data "
                f"have shape {spec.shape}."
            )

    def load(self, room: Room) -> Network:
        """Returns the classifier, trained now unless it was before."""
        file = room.cache / "classifiers" / f"digits_{_VERSION}.npz"
        try:
            params = _read(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            # Not there, or damaged.
            _train(file)
            params = _read(file)
        content = file.read_bytes()
        about = {
            "network": "digits perceptron 64-128-64-10",
            "weights": hashlib.sha256(content).hexdigest(),
        }
        return Network(params, _apply, lambda x: x, about)


def _read(file: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _train(file: pathlib.Path) -> None:
    from sklearn import datasets, neural_network

    digits = datasets.load_digits()
    network = neural_network.MLPClassifier(
        _WIDTHS, alpha=1e-3, learning_rate_init=2e-3, max_iter=60, random_state=0
    )
    import warnings

    with warnings.catch_warnings():
        # 60 epochs are what it gets; that they are the last is no news.
        warnings.simplefilter("ignore")
        network.fit(digits.data / 8 - 1, digits.target)
    arrays = {}
    for i, (kernel, bias) in enumerate(
        zip(network.coefs_, network.intercepts_, strict=True)
    ):
        arrays[f"kernel_{i}"] = kernel.astype(np.float32)
        arrays[f"bias_{i}"] = bias.astype(np.float32)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.stem}.{os.getpid()}.npz")
    np.savez(temporary, **arrays)
    os.replace(temporary, file)


def _apply(params, x):
    h = x.reshape(x.shape[0], -1).astype(jnp.float32)
    for i in range(len(_WIDTHS)):
        h = jax.nn.relu(h @ params[f"kernel_{i}"] + params[f"bias_{i}"])
    last = len(_WIDTHS)
    logits = h @ params[f"kernel_{last}"] + params[f"bias_{last}"]
    return {"features": h, "logits": logits}
