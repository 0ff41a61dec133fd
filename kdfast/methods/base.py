"""What every method shares: a student, perhaps a teacher, and a loss in two halves.

The first half is the network: `student_outputs` turns inputs into outputs (logits, features) and is the
only place the student's parameters enter. The second half is the head: `losses` turns outputs, the
teacher's outputs and the targets into named loss parts, and is the only place the meta-parameters enter.
The meta-gradient engine needs exactly this split: it asks the network for its outputs at a displaced
point, and the head for its gradient in the meta-parameters there.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Distiller(nn.Module):
    """A student being distilled.

    Args:
        student: the network to train.
        teacher: a trained network, or None. It is frozen and stays in eval mode whatever `train()` is
            called with, moves with `to()`, and is no part of `state_dict()` or `parameters()`.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None):
        super().__init__()
        self.student = student
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

    def validation_loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """What the meta-parameters are learned to lower. Default: cross-entropy of the logits."""
        return nn.functional.cross_entropy(self.logits(outputs), targets)

    def logits(self, outputs: Any) -> Tensor:
        """The student's logits [batch, classes] among its outputs."""
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
        """The bare student: no head, no transforms, no teacher."""
        return self.student
