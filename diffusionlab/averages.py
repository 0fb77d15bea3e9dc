"""What an average of parameters may be called, by a flag or by a key of a config.

A name of the block `ema` of a run, 'none' for the parameters themselves, or
'sigma_rel=WIDTH' for one that is reconstructed from stored averages of other widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusionlab import ema

RAW = "none"
_WIDTH = "sigma_rel="


def is_reconstructed(name: str) -> bool:
    """Whether it is 'sigma_rel=WIDTH'."""
    return name.startswith(_WIDTH)


def check(kept: Mapping[str, Any], name: str, path: str) -> None:
    """Checks that there can be an average of this name.

    Args:
      kept: the averages of the run, by name.
      name: that was asked for.
      path: the flag or the key that asks, for messages.

    Raises:
      ValueError: there is none; lists those there are.
    """
    if name == RAW or name in kept:
        return
    if not is_reconstructed(name):
        raise ValueError(
            f"{path}: no average '{name}'; there are: {', '.join([*kept, RAW])}; or "
            "sigma_rel=WIDTH."
        )
    width(name, path)
    if not any(isinstance(average, ema.Power) for average in kept.values()):
        raise ValueError(
            f"{path}: '{name}' is reconstructed from an average 'power', and the run "
            f"keeps none; there are: {', '.join([*kept, RAW])}."
        )


def width(name: str, path: str) -> float:
    """'sigma_rel=0.1' -> 0.1.

    Raises:
      ValueError: it is no number, or no average has this width.
    """
    try:
        found = float(name.removeprefix(_WIDTH))
    except ValueError:
        raise ValueError(
            f"{path}: expected sigma_rel=WIDTH with a number, got '{name}'."
        ) from None
    try:
        ema.gamma_of(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found
