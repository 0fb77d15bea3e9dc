"""A classifier that this program trained, as a feature network."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import ClassVar

from diffusionlab.features.base import Network, Room
from diffusionlab.types import DataSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierRun:
    """The network of a finished run of the objective `noisy_classification`, at t = 0.

    Outputs: 'features', what its last layer sees, and 'logits'.

    Attributes:
      run: the run directory.
      step: of the checkpoint; None is the newest.
    """

    outputs: ClassVar[tuple[str, ...]] = ("features", "logits")

    run: str
    step: int | None = None

    def check(self, spec: DataSpec) -> None:
        """Raises FileNotFoundError where there is no run; `load` compares shapes."""
        if not (pathlib.Path(self.run) / "config.json").is_file():
            raise FileNotFoundError(
                f"run: '{self.run}' holds no run; give the directory of a classifier "
                "trained by this program, see configs/digits/classifier.py."
            )

    def load(self, room: Room) -> Network:
        """Restores it.

        Raises:
          ValueError: the run is no classifier, or its last layer's input is unknown.
        """
        params, apply, about = room.open_run(pathlib.Path(self.run), self.step)
        return Network(params, apply, lambda x: x, about)
