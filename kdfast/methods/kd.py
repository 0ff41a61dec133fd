"""The baselines on logits: a student alone, Hinton's distillation with fixed temperatures, born-again networks."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kdfast.losses import _checks as check
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
        check.fraction("alpha", alpha)
        self.alpha, self.temperature = alpha, check.positive("temperature", temperature)

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


class BornAgain(Distiller):
    """A student like its teacher, on the task and on the teacher's probabilities: a further generation of one network.

    Loss: task + cross-entropy between the teacher's probabilities and the student's, at temperature 1.

    Args:
        student: returns logits [batch, classes]; a freshly initialised network of the teacher's architecture.
        teacher: the generation before it.
        task_loss, validation_loss: see `Distiller`.

    Source: Furlanello et al., "Born Again Neural Networks", ICML 2018 (arXiv:1805.04770); with the labels and
    the whole of the teacher's probabilities. The ensemble of all generations is not built here.

    Example:
        >>> second = BornAgain(fresh_network, first_network)
        >>> third = second.reborn(another_fresh_network)  # once the second is trained
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        task_loss: Loss = cross_entropy,
        validation_loss: Loss | None = None,
    ):
        super().__init__(student, teacher, task_loss=task_loss, validation_loss=validation_loss)

    def losses(self, outputs: Tensor, teacher_outputs: Tensor, targets: Any) -> dict[str, Tensor]:
        logits = self.logits(outputs)
        soft = kd_loss(logits, teacher_outputs, student_temperature=1.0, divergence="soft_ce", scale="none")
        return {"task": self.task_loss(logits, targets), "kd": soft}

    def reborn(self, student: nn.Module) -> "BornAgain":
        """The next generation, whose teacher is this one's student; that is frozen from here on."""
        return BornAgain(student, self.student, task_loss=self.task_loss, validation_loss=self._validation_loss)
