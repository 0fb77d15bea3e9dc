"""Statistics of features in a file: those that others publish, and our own.

An .npz file with `mu` `[d]` and `sigma` `[d, d]`, as pytorch-fid, clean-fid and the
evaluator of ADM write or read them; ADM's also have `mu_s` and `sigma_s` of the spatial
features. (torch-fidelity keeps its own in pickled .pt files, which are not read.)

Ours have besides `num`, the number of examples, and `about`, JSON with the
`fingerprint` of the network, so that statistics of another network are refused. A file
of others says nothing about its network: what it was computed with is up to who gives
it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusionlab.features.base import Network
from diffusionlab.metrics.base import Features

_NAMES = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_SYMMETRY = 1e-4  # of the largest variance; sums in float32 stay well below

OUTPUTS = tuple(_NAMES)
"""Of a network, those that have a place in such a file."""


class Known(NamedTuple):
    """Moments of which the number of rows may not be known; see `moments.Moments`.

    Attributes:
      num: rows; where it is not known infinity, as of the gaussian itself: nothing is
        said to be too few, and the scatter of what is merged with them is NaN.
      mean: `[d]` float64.
      covariance: `[d, d]` float64.
    """

    num: float
    mean: np.ndarray
    covariance: np.ndarray

    @property
    def scatter(self) -> np.ndarray:
        """`[d, d]`; of an unknown number of rows it is that of two."""
        return self.covariance * (self.num - 1 if self.num < math.inf else 1)


class StatisticsFile(NamedTuple):
    """What `metrics.base.Features` asks for, of moments alone.

    Attributes:
      name: for messages.
      num: examples; 0 where it is not known.
      known: moments by output.
      about: of our own files what `write` was given, else empty.
      digest: sha256 of the moments, for the record.
    """

    name: str
    num: int
    known: Mapping[str, Known]
    about: Mapping[str, Any]
    digest: str
    label: None = None
    class_names: tuple[str, ...] = ()

    def rows(self, output: str) -> np.ndarray:
        """Raises ValueError: there are none."""
        raise ValueError(
            f"reference: {self.name} has statistics only; this metric needs the "
            "features of every example: give the data as the reference."
        )

    def moments(self, output: str) -> Known:
        """Returns the moments of an output.

        Raises:
          ValueError: the file does not have them.
        """
        if output not in self.known:
            wanted = " and ".join(f"'{n}'" for n in _NAMES.get(output, ())) or "none"
            raise ValueError(
                f"reference: {self.name} has no statistics of the output '{output}' "
                f"({wanted}); it has those of {', '.join(self.known)}."
            )
        return self.known[output]

    def examples(self, indices: Sequence[int]) -> np.ndarray:
        """Raises ValueError: there are none."""
        raise ValueError(f"reference: {self.name} has statistics only, no examples.")


def read(
    path: str | os.PathLike,
    network: Network | None = None,
    widths: Mapping[str, int] | None = None,
) -> StatisticsFile:
    """Reads statistics.

    Args:
      path: of the .npz file.
      network: that the samples go through; a file that says it is of another one is
        refused.
      widths: of the outputs of this network, where they are known.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no such file, damaged, not finite, or of another network.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"reference: there is no file '{path}'.")
    arrays = _arrays(path)
    about, num = _about(arrays, path), _num(arrays, path)
    found = about.get("fingerprint")
    if network is not None and found is not None and found != network.fingerprint:
        raise ValueError(
            f"reference: {path} has statistics of another network: "
            f"{_difference(about.get('network'), network.about)}."
        )
    known = {
        output: _checked(arrays, output, num, path)
        for output, names in _NAMES.items()
        if set(names) <= set(arrays)
    }
    for output, width in (widths or {}).items():
        if output in known and len(known[output].mean) != width:
            raise ValueError(
                f"reference: {path} has {len(known[output].mean)} {output}, and the "
                f"network {width}: it is of another network."
            )
    digest = hashlib.sha256()
    for _, mean, covariance in known.values():
        digest.update(mean.tobytes() + covariance.tobytes())
    return StatisticsFile(
        name=str(path),
        num=num,
        known=known,
        about=about,
        digest=digest.hexdigest(),
    )


def write(
    path: str | os.PathLike,
    features: Features,
    about: Mapping[str, Any],
    outputs: Sequence[str] = ("features",),
) -> None:
    """Writes the moments of features, whole or not at all.

    Args:
      path: of the .npz file.
      features: with at least two examples.
      about: JSON; `fingerprint` of the network is needed, its `about` as `network`
        lets a mismatch be explained.
      outputs: of the network: 'features', 'spatial'.

    Raises:
      ValueError: `about` has no fingerprint, or an output has no place in the file.
    """
    if "fingerprint" not in about:
        raise ValueError("about: has no 'fingerprint' of the network.")
    arrays: dict[str, Any] = {"num": features.num, "about": json.dumps(about)}
    for output in outputs:
        if output not in _NAMES:
            raise ValueError(
                f"outputs: '{output}' has no name in such files; accepted: "
                f"{', '.join(_NAMES)}."
            )
        moments = features.moments(output)
        mean, covariance = _NAMES[output]
        arrays |= {mean: moments.mean, covariance: moments.covariance}
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    np.savez(temporary, **arrays)
    os.replace(temporary, path)


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    wanted = {"num", "about"}.union(*_NAMES.values())
    try:
        if path.suffix == ".npy":
            raise ValueError("it has one array")
        with np.load(path) as file:
            arrays = {name: file[name] for name in wanted & set(file.files)}
            there = ", ".join(sorted(file.files)) or "nothing"
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
    ) as error:
        raise ValueError(
            f"reference: cannot read {path}: {str(error).rstrip('.')}; it is no .npz "
            "file of numbers, or is damaged or cut short."
        ) from None
    if not {"mu", "sigma"} <= set(arrays):
        raise ValueError(
            f"reference: {path} has no 'mu' and 'sigma', so it holds no statistics; it "
            f"has {there}."
        )
    return arrays


def _about(arrays: Mapping[str, np.ndarray], path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(str(arrays.get("about", "{}")))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"reference: 'about' of {path} is no JSON object.")
    return found


def _num(arrays: Mapping[str, np.ndarray], path: pathlib.Path) -> int:
    num = np.asarray(arrays.get("num", 2))
    if num.shape or not np.issubdtype(num.dtype, np.integer) or num < 2:
        raise ValueError(f"reference: 'num' of {path} is {num}, no number of examples.")
    return int(num) if "num" in arrays else 0


def _checked(arrays, output: str, num: int, path: pathlib.Path) -> Known:
    """The moments of one output, in float64, the covariance exactly symmetric."""
    of_mean, of_covariance = _NAMES[output]
    mean, covariance = arrays[of_mean], arrays[of_covariance]
    width = mean.size
    for name, array, shape in (
        (of_mean, mean, (width,)),
        (of_covariance, covariance, (width, width)),
    ):
        what = f"reference: '{name}' of {path}"
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"{what} is {array.dtype}, expected floats.")
        if array.shape != shape or not width:
            raise ValueError(
                f"{what} has shape {array.shape}, expected mu [d] and sigma [d, d]; "
                f"'{of_mean}' has {mean.shape}."
            )
        if not np.isfinite(array).all():
            raise ValueError(f"{what} has values that are NaN or infinite.")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    skew = np.max(np.abs(covariance - covariance.T))
    variance = np.diagonal(covariance)
    if skew > _SYMMETRY * np.max(np.abs(variance)) or variance.min() < 0:
        raise ValueError(
            f"reference: '{of_covariance}' of {path} is no covariance: "
            + (
                f"it has the negative variance {variance.min():.4g}."
                if variance.min() < 0
                else f"it is not symmetric, by up to {skew:.4g}."
            )
        )
    return Known(num or math.inf, mean, (covariance + covariance.T) / 2)


def _difference(theirs: Any, ours: Mapping[str, Any]) -> str:
    """What of two descriptions of networks differs."""
    if not isinstance(theirs, Mapping):
        return f"not of {dict(ours)}"
    return ", ".join(
        f"{key} {theirs.get(key)!r} there, {ours.get(key)!r} here"
        for key in sorted({*theirs, *ours})
        if theirs.get(key) != ours.get(key)
    )
