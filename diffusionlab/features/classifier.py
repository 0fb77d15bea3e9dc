"""A classifier that this program trained, as a feature network."""

from __future__ import annotations

import dataclasses
import json
import pathlib

from diffusionlab.features.base import Network, Room
from diffusionlab.types import DataSpec

_OBJECTIVE = "noisy_classification"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierRun:
    """The network of a finished run of the objective `noisy_classification`, at t = 0.

    Outputs: 'features', what its last layer sees, and 'logits'.

    Attributes:
      run: the run directory.
      step: of the checkpoint; None is the newest.
    """

    outputs = ("features", "logits")

    run: str
    step: int | None = None

    def check(self, spec: DataSpec) -> None:
        """Raises FileNotFoundError where there is no run, ValueError for another kind.

        Whether the shapes agree is seen when it is restored.
        """
        file = pathlib.Path(self.run) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"run: '{self.run}' holds no run; give the directory of a classifier "
                "trained by this program, see configs/digits/classifier.py."
            )
        objective = json.loads(file.read_text(encoding="utf-8"))["objective"]["name"]
        if objective != _OBJECTIVE:
            raise ValueError(
                f"run: the run in '{self.run}' has the objective '{objective}', which "
                f"is no classifier; give one of '{_OBJECTIVE}'."
            )

    def load(self, room: Room) -> Network:
        """Restores it.

        Raises:
          ValueError: there is no such step, or its last layer's input has no name.
        """
        params, apply, about = room.open_run(pathlib.Path(self.run), self.step)
        return Network(params, apply, lambda x: x, about)
