"""A training made visible while it runs: a bar on the terminal, curves for TensorBoard."""

import math
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kdfast.train.history import EpochRecord, StepRecord


class Watch:
    """Shows loss parts, accuracy and images a second, and writes them to a folder of TensorBoard's.

    The loss is read, which waits for a GPU, a few times a second only.

    Args:
        console: where the bar is, and a line an epoch.
        steps: of the whole training.
        folder: of the event files; None for none, as in every process but the first.
        done: steps before this start, whose events are kept.

    Raises:
        ImportError: without TensorBoard, naming the command that installs it.
    """

    def __init__(self, console: Console, steps: int, folder: Path | None, done: int = 0):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.console, self.progress = console, Progress(*columns, console=console)
        self._task = self.progress.add_task("starting", total=steps, completed=done)
        self._writer = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "TensorBoard is not installed; run: pip install tensorboard, or leave it out."
                ) from error
            self._writer = SummaryWriter(str(folder), purge_step=done)
        self._accuracy, self._images, self._since, self._shown = "", 0, time.perf_counter(), -math.inf

    def __enter__(self) -> "Watch":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()
        if self._writer is not None:
            self._writer.close()

    def step(self, record: StepRecord) -> None:
        """A `Trainer`'s callback."""
        self._images += record.images
        now = time.perf_counter()
        if now - self._shown < 0.25:
            self.progress.update(self._task, advance=1)
            return
        parts = {name: float(part) for name, part in record.parts.items()}
        speed = self._images / (now - self._since)
        named = ", ".join(f"{name} {value:.3f}" for name, value in parts.items())
        text = f"epoch {record.epoch + 1}: {named}{self._accuracy}, {speed:,.0f} images/s"
        self.progress.update(self._task, advance=1, description=text)
        self._write({f"loss/{name}": value for name, value in parts.items()} | {"images/s": speed}, record.step)
        self._shown, self._since, self._images = now, now, 0

    def epoch(self, record: EpochRecord) -> None:
        """A `Trainer`'s on_epoch."""
        measured = {"test": record.accuracy, "validation": record.validation_accuracy}
        measured = {name: value for name, value in measured.items() if value is not None}
        self._accuracy = "".join(f", {name} {100 * value:.2f} %" for name, value in measured.items()) or self._accuracy
        named = ", ".join(f"{name} {value:.3f}" for name, value in record.parts.items())
        self.progress.console.print(
            f"epoch {record.epoch + 1}: {named}{self._accuracy}, {record.images_per_second:,.0f} images/s, "
            f"{100 * record.waiting:.2f} % of the time waiting for data"
        )
        values = {f"accuracy/{name}": value for name, value in measured.items()} | {"learning rate": record.lr}
        self._write(values, record.steps)

    def _write(self, values: dict[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
