"""Where numbers, pictures and text of a run go: metrics.jsonl, TensorBoard, W&B.

`Writers` hands everything to one background thread, which also fetches arrays from the
device: the training loop waits for neither disk nor network. An error there is raised
in the loop at its next call.
"""

from __future__ import annotations

import collections
import json
import math
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, Protocol

import numpy as np

METRICS_FILE = "metrics.jsonl"

Values = dict[str, float | list]


class Writer(Protocol):
    """One place to write to; called from one thread."""

    def scalars(self, step: int, values: Values) -> None: ...
    def image(self, step: int, name: str, picture: np.ndarray) -> None: ...
    def text(self, step: int, name: str, text: str) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def _plain(values: Mapping[str, Any]) -> Values:
    """Numbers and arrays, on a device or not, as floats and lists."""
    return {name: np.asarray(v, np.float64).tolist() for name, v in values.items()}


def _flat(values: Values) -> dict[str, float]:
    """Entry i of a vector becomes `name/i`."""
    result = {}
    for name, value in values.items():
        parts = enumerate(value) if isinstance(value, list) else ()
        result |= {f"{name}/{i}": part for i, part in parts} or {name: value}
    return result


def _valid(value):
    """JSON has no NaN and no infinity: they become strings, 'nan', 'inf' or '-inf'."""
    if isinstance(value, list):
        return [_valid(part) for part in value]
    return value if math.isfinite(value) else str(value)


def number(value: Any) -> float | None:
    """Returns a finite float; None where there is none: of 'nan', lists, None."""
    if isinstance(value, bool | list) or value is None:
        return None
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def read_rows(path: str | os.PathLike) -> list[dict]:
    """Returns the rows of a metrics file; a torn last line is left out.

    Raises:
      ValueError: another line is damaged; names it.
    """
    text = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            # A process that is killed leaves at most its last line unfinished.
            if number < len(lines):
                raise ValueError(f"{path}:{number}: damaged: {error}.") from error
    return rows


class MetricsFile:
    """Appends one JSON object per row: `{"step": k, name: value, ...}`."""

    def __init__(self, path: str | os.PathLike):
        self._path = pathlib.Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")

    def truncate_after(self, step: int) -> None:
        """Drops a torn end, and rows of later steps, which will be written anew."""
        self._file.close()
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            for row in read_rows(self._path):
                if row["step"] <= step:
                    file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: Values) -> None:
        row = {"step": int(step)} | {k: _valid(v) for k, v in values.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Does nothing: pictures lie as PNG files in the run directory."""

    def text(self, step: int, name: str, text: str) -> None:
        """Does nothing: text lies in files of its own."""

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard events, written without TensorFlow.

    Args:
      folder: where the event files go.
      purge_step: TensorBoard forgets what was written earlier for this step or later.
    """

    def __init__(self, folder: str | os.PathLike, purge_step: int | None = None):
        import tensorboardX

        # Files are named by the second, and a second one of that name would replace it.
        self._writer = tensorboardX.SummaryWriter(
            str(folder), purge_step=purge_step, filename_suffix=f".{time.time_ns()}"
        )

    def scalars(self, step: int, values: Values) -> None:
        for name, value in _flat(values).items():
            # A bin that nothing fell into has no mean; TensorBoard has no such value.
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def text(self, step: int, name: str, text: str) -> None:
        # TensorBoard renders markdown: indented text is shown as it is.
        indented = "\n".join(f"    {line}" for line in text.splitlines())
        self._writer.add_text(name, indented, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run; a resumed run continues under the id in `folder`.

    WANDB_MODE=offline writes locally, without an account.

    Args:
      project: name of the project.
      folder: where W&B keeps its files, and we the id of the run.
      run_id: None takes the stored one, or makes a new one.
      config: shown with the run.

    Raises:
      ModuleNotFoundError: wandb is not installed.
    """

    def __init__(
        self,
        project: str,
        folder: str | os.PathLike,
        run_id: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"config.logging.wandb is '{project}', but wandb is not installed: "
                "run 'pip install wandb', or set config.logging.wandb=''."
            ) from error
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stored = folder / "run_id.txt"
        if run_id is None and stored.exists():
            run_id = stored.read_text(encoding="utf-8").strip()
        run_id = run_id or uuid.uuid4().hex[:8]
        stored.write_text(run_id + "\n", encoding="utf-8")
        self._image = wandb.Image
        self._run = wandb.init(
            project=project,
            id=run_id,
            dir=str(folder),
            resume="allow",
            config=dict(config or {}),
            settings=wandb.Settings(console="off", silent=True),
        )
        # Our own step as the axis: W&B's must not go back, but a resumed run does.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Values) -> None:
        self._run.log({"step": step, **_flat(values)})

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        self._run.log({"step": step, name: self._image(picture)})

    def text(self, step: int, name: str, text: str) -> None:
        # Of each name the newest.
        self._run.summary[name] = text

    def flush(self) -> None:
        """W&B sends in the background by itself."""

    def close(self) -> None:
        self._run.finish()


class Writers:
    """Several writers behind one background thread; with none, does nothing.

    An error of the thread is raised by the next call. `flush` and `close` wait.
    """

    def __init__(self, writers: Sequence[Writer] = ()):
        self._writers = tuple(writers)
        # One worker keeps the order of rows, and makes the writers single-threaded.
        self._pool = futures.ThreadPoolExecutor(1, "writers") if writers else None
        self._pending: collections.deque[futures.Future] = collections.deque()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes a row; values are numbers or arrays, on a device or not."""
        values = dict(values)

        def write():
            plain = _plain(values)
            for writer in self._writers:
                writer.scalars(int(step), plain)

        self._submit(write)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Writes uint8 `[H, W, 3]`."""
        self._submit(lambda: [w.image(int(step), name, picture) for w in self._writers])

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text: samples, or at step 0 the config."""
        self._submit(lambda: [w.text(int(step), name, text) for w in self._writers])

    def flush(self) -> None:
        """Waits until everything is written."""
        self._submit(lambda: [w.flush() for w in self._writers])
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Waits, and closes every writer; a second call does nothing."""
        if self._pool is None:
            return
        try:
            self.flush()
        finally:
            self._pool.shutdown()
            self._pool = None
            for writer in self._writers:
                writer.close()

    def _submit(self, job: Callable[[], Any]) -> None:
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        if self._pool is not None:
            self._pending.append(self._pool.submit(job))


def open_writers(
    workdir: str | os.PathLike,
    *,
    step: int = 0,
    process_index: int = 0,
    tensorboard: bool = True,
    wandb: str = "",
    config: Mapping[str, Any] | None = None,
) -> Writers:
    """Returns the writers of a run directory; for processes other than 0, none.

    Args:
      workdir: the run directory.
      step: finished steps; what was written for later ones is dropped.
      tensorboard: also write `tensorboard/`.
      wandb: project at Weights & Biases, where `config` is shown; '' is off.
    """
    if process_index:
        return Writers()
    workdir = pathlib.Path(workdir)
    metrics = MetricsFile(workdir / METRICS_FILE)
    metrics.truncate_after(step)
    writers: list[Writer] = [metrics]
    if tensorboard:
        writers.append(TensorBoard(workdir / "tensorboard", purge_step=step + 1))
    if wandb:
        writers.append(WandB(wandb, workdir / "wandb", config=config))
    return Writers(writers)
