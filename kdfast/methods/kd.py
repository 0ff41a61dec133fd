"""The baselines: a student alone, and Hinton's distillation with fixed temperatures."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kdfast.losses.kd_kl import kd_loss
from kdfast.methods.base import Distiller, Loss


class Alone(Distiller):
    """The student on the task alone.

    Args:
        student: returns what the task loss takes.
        task_loss, validation_loss: see `Distiller`.
    """

    def __init__(self, student: nn.Module, *, task_loss: Loss = cross_entropy, validation_loss: Loss | None = None):
        super().__init__(student, task_loss=task_loss, validation_loss=validation_loss)

    def losses(self, outputs: Any, teacher_outputs: None, targets: Any) -> dict[str, Tensor]:
        return {"task": self.task_loss(self.logits(outputs), targets)}


class KD(Distiller):
    """Distillation of the logits: alpha * task + (1 - alpha) * tau^2 * KL(teacher || student), both softened by tau.

    Args:
        student: returns logits [batch, classes].
        teacher: the same.
        alpha: share of the task loss, in [0, 1].
        temperature: tau > 0, of both.
        task_loss, validation_loss: see `Distiller`. Cross-entropy is computed in one sweep with the divergence.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015 (arXiv:1503.02531).

    Example:
        >>> distiller = KD(student, teacher, alpha=0.1)
        >>> parts = distiller.losses(distiller.student_outputs(x), distiller.teacher_outputs(x), y)
        >>> sum(parts.values()).backward()
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        alpha: float = 0.5,
        temperature: float = 4.0,
        task_loss: Loss = cross_entropy,
        validation_loss: Loss | None = None,
    ):
        super().__init__(student, teacher, task_loss=task_loss, validation_loss=validation_loss)
        self.alpha, self.temperature = alpha, temperature

    def losses(
        self,
        outputs: Tensor,  # [batch, classes]
        teacher_outputs: Tensor,  # [batch, classes]
        targets: Any,  # of the task loss; for cross-entropy [batch] class indices or [batch, classes] probabilities
    ) -> dict[str, Tensor]:
        logits = self.logits(outputs)
        if self.task_loss is cross_entropy:
            loss = kd_loss(logits, teacher_outputs, targets, alpha=self.alpha, student_temperature=self.temperature)
            return {"kd": loss}
        soft = kd_loss(logits, teacher_outputs, student_temperature=self.temperature)
        return {"task": self.alpha * self.task_loss(logits, targets), "kd": (1 - self.alpha) * soft}
