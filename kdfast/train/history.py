"""What a training went through: records of its steps and epochs."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class StepRecord:
    """What one step did.

    Attributes:
        step, epoch: both count from 0.
        parts: the training loss's named parts before the step, detached scalars, not yet waited for.
        seconds: duration of the step alone (forward, backward, update), without data and evaluation; on a GPU, of
            giving it out.
        images: how many it saw, in all processes.
        meta: whether it was a meta-step.
    """

    step: int
    epoch: int
    parts: dict[str, Tensor]
    seconds: float
    images: int
    meta: bool

    @property
    def loss(self) -> float:
        """The sum of the parts; waits for the device."""
        return float(sum(self.parts.values()))


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch did.

    Attributes:
        epoch: counts from 0.
        steps: done since the start of the training.
        parts: the loss's parts, means over the epoch's steps.
        lr: after the last step, of the first parameter group, times the method's own factor where it has one.
        accuracy: of the student on the evaluation images, in [0, 1]; None where it was not measured.
        validation_accuracy, validation_loss: of held-out images that train nothing; None without them.
        seconds: of the epoch, without evaluation; after an interruption of the part since.
        images_per_second: in that time.
        waiting: share of that time in which the steps waited for their batches, of both streams.
    """

    epoch: int
    steps: int
    parts: dict[str, float]
    lr: float
    accuracy: float | None
    validation_accuracy: float | None
    validation_loss: float | None
    seconds: float
    images_per_second: float
    waiting: float = 0.0

    @property
    def loss(self) -> float:
        return sum(self.parts.values())


@dataclass
class History:
    """What a training went through: a record an epoch."""

    epochs: list[EpochRecord] = field(default_factory=list)

    @property
    def selected_on(self) -> str:
        """What the best epoch is chosen on: "validation" where held-out images were measured, else "test"."""
        return "validation" if self.epochs and self.epochs[-1].validation_accuracy is not None else "test"

    @property
    def best(self) -> EpochRecord | None:
        """The measured epoch with the highest accuracy, the earliest of equals."""
        name = "validation_accuracy" if self.selected_on == "validation" else "accuracy"
        measured = [record for record in self.epochs if getattr(record, name) is not None]
        return max(measured, key=lambda record: getattr(record, name)) if measured else None

    @property
    def last(self) -> EpochRecord | None:
        return self.epochs[-1] if self.epochs else None
