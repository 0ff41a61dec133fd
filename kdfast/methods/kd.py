"""The baselines: a student alone, and Hinton's distillation with fixed temperatures."""

from torch import Tensor, nn

from kdfast.losses.kd_kl import kd_loss
from kdfast.methods.base import Distiller


class Alone(Distiller):
    """The student on the labels alone, by cross-entropy."""

    def __init__(self, student: nn.Module):
        super().__init__(student)

    def losses(
        self,
        outputs: Tensor,  # [batch, classes]
        teacher_outputs: None,
        targets: Tensor,  # [batch] class indices, or [batch, classes] probabilities
    ) -> dict[str, Tensor]:
        return {"task": nn.functional.cross_entropy(self.logits(outputs), targets)}


class KD(Distiller):
    """Distillation of the logits: alpha * CE + (1 - alpha) * tau^2 * KL(teacher || student), both softened by tau.

    Args:
        student: returns logits [batch, classes].
        teacher: the same.
        alpha: share of the labels' cross-entropy, in [0, 1].
        temperature: tau > 0, of both.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015 (arXiv:1503.02531).

    Example:
        >>> distiller = KD(student, teacher, alpha=0.1)
        >>> parts = distiller.losses(distiller.student_outputs(x), distiller.teacher_outputs(x), y)
        >>> sum(parts.values()).backward()
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, *, alpha: float = 0.5, temperature: float = 4.0):
        super().__init__(student, teacher)
        self.alpha, self.temperature = alpha, temperature

    def losses(
        self,
        outputs: Tensor,  # [batch, classes]
        teacher_outputs: Tensor,  # [batch, classes]
        targets: Tensor,  # [batch] class indices, or [batch, classes] probabilities
    ) -> dict[str, Tensor]:
        loss = kd_loss(
            self.logits(outputs), teacher_outputs, targets, alpha=self.alpha, student_temperature=self.temperature
        )
        return {"kd": loss}
