"""What every method shares: a student, perhaps a teacher, and a loss in two halves.

The first half is the network: `student_outputs` turns inputs into outputs (logits, features) and is the
only place the student's parameters enter. The second half is the head: `losses` turns outputs, the
teacher's outputs and the targets into named loss parts, and is the only place the meta-parameters enter.
The meta-gradient engine needs exactly this split: it asks the network for its outputs at a displaced
point, and the head for its gradient in the meta-parameters there.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kdfast.models.tapped import bare

Loss = Callable[[Any, Any], Tensor]  # of (logits, targets), to a scalar


class Distiller(nn.Module):
    """A student being distilled.

    Args:
        student: the network to train.
        teacher: a trained network, or None. It is frozen and stays in eval mode whatever `train()` is
            called with, moves with `to()`, and is no part of `state_dict()` or `parameters()`.
        task_loss: of (what `logits` makes of the outputs, the targets), to a scalar; cross-entropy unless given.
        validation_loss: of the same, on held-out data: what meta-parameters are learned to lower and what a trainer
            reports. The task loss unless given.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        task_loss: Loss = cross_entropy,
        validation_loss: Loss | None = None,
    ):
        super().__init__()
        for name, loss in (("task_loss", task_loss), ("validation_loss", validation_loss)):
            if not callable(loss) and (loss is not None or name == "task_loss"):
                raise TypeError(f"{name} must be a function of (logits, targets), got {type(loss).__name__}.")
        if teacher is student:
            raise ValueError("teacher must be a network of its own, got the student itself, which it would freeze.")
        self.student, self.task_loss, self._validation_loss = student, task_loss, validation_loss
        self._teacher = (teacher,)  # in a tuple, so that nn.Module does not register it
        if teacher is not None:
            teacher.requires_grad_(False).eval()

    @property
    def teacher(self) -> nn.Module | None:
        return self._teacher[0]

    def _apply(self, fn, recurse=True):
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def student_outputs(self, inputs: Tensor) -> Any:
        """Logits, or a tuple or dict of logits and features; depends on the student's parameters only."""
        return self.student(inputs)

    @torch.no_grad()
    def teacher_outputs(self, inputs: Tensor) -> Any:
        """What the head needs of the teacher; computed once a batch, without gradient."""
        return None if self.teacher is None else self.teacher(inputs)

    def losses(self, outputs: Any, teacher_outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        """The named parts of the training loss, which is their sum."""
        raise NotImplementedError

    def losses_and_slope(
        self, outputs: Any, teacher_outputs: Any, targets: Any
    ) -> tuple[dict[str, Tensor], Callable[[Any, Any, Callable[[], Tensor]], Tensor] | None]:
        """`losses`, and the method's own way to their derivative along the outputs, None where it has none.

        The meta-gradient needs that derivative as a function of the meta-parameters. It is had by differentiating
        `losses` twice, in a second pass through the head; a method whose head is large may know it from what the first
        backward pass has in passing.

        Returns:
            The parts, and None or a function of (tangents, factor, general): tangents in the structure of `outputs`;
            what the loss was multiplied by before its backward pass; a function that takes the derivative of
            `losses` as above. It is called after the backward pass, with the meta-parameters unchanged.
        """
        return self.losses(outputs, teacher_outputs, targets), None

    def validation_loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """What the meta-parameters are learned to lower, and the measure of held-out data."""
        return (self._validation_loss or self.task_loss)(self.logits(outputs), targets)

    def logits(self, outputs: Any) -> Tensor:
        """What the task loss takes of the student's outputs: the logits [batch, classes], or another task's like."""
        return outputs

    def meta_parameters(self) -> Iterator[nn.Parameter]:
        """What the meta-optimizer trains: none, unless the method learns something."""
        return iter(())

    def inner_parameters(self) -> Iterator[nn.Parameter]:
        """What the optimizer trains: every parameter that is not a meta-parameter."""
        meta = {id(p) for p in self.meta_parameters()}
        return (p for p in self.parameters() if id(p) not in meta)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Told by a trainer before each epoch, from 0, of `epochs` in all; for methods whose loss changes with time."""

    def start_step(self, step: int) -> None:
        """Told by a trainer before each step, counted from 0 over the whole training."""

    def end_epoch(self, validation_loss: float | None) -> None:
        """Told by a trainer after each epoch; the mean task loss of held-out data where it has any, else None."""

    def export(self) -> nn.Module:
        """The bare student: no head, no transforms, no teacher, no `kdfast.models.Tapped` around it."""
        return bare(self.student)
