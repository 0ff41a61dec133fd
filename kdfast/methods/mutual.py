"""Online distillation, without a trained teacher: DML's two students, ONE's branches."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kdfast.losses.kd_kl import kd_loss
from kdfast.methods.base import Distiller, Loss
from kdfast.methods.stages import image_of, measured_channels


class DML(Distiller):
    """Deep mutual learning: two students, each on the task and on the other's probabilities.

    Loss of each: task + KL(other || it), the other's probabilities taken as constants, at temperature 1. Both are
    trained in the same step; the paper updates one and then, on its new predictions, the other.

    Args:
        student: returns logits [batch, classes]; it is what `export` gives.
        peer: the same; untrained, and trained along. It need not have the student's layers.
        task_loss, validation_loss: see `Distiller`.

    Source: Zhang et al., "Deep Mutual Learning", CVPR 2018 (arXiv:1706.00384).

    Example:
        >>> distiller = DML(student, peer)
        >>> parts = distiller.losses(distiller.student_outputs(x), None, y)
    """

    def __init__(
        self,
        student: nn.Module,
        peer: nn.Module,
        *,
        task_loss: Loss = cross_entropy,
        validation_loss: Loss | None = None,
    ):
        super().__init__(student, task_loss=task_loss, validation_loss=validation_loss)
        if peer is student:
            raise ValueError("peer must be a network of its own, got the student itself; build a second one.")
        self.peer = peer.requires_grad_(True)

    def student_outputs(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of both; in eval mode the student's alone."""
        return (self.student(inputs), self.peer(inputs)) if self.training else self.student(inputs)

    def logits(self, outputs: tuple[Tensor, Tensor] | Tensor) -> Tensor:
        return outputs if isinstance(outputs, Tensor) else outputs[0]

    def losses(self, outputs: tuple[Tensor, Tensor], teacher_outputs: None, targets: Any) -> dict[str, Tensor]:
        mine, other = outputs
        return {
            "task": self.task_loss(mine, targets),
            "peer_task": self.task_loss(other, targets),
            "mutual": kd_loss(mine, other.detach(), student_temperature=1.0),
            "peer_mutual": kd_loss(other, mine.detach(), student_temperature=1.0),
        }


class ONE(Distiller):
    """On-the-fly native ensemble: branches on a shared trunk, taught by their own gated ensemble.

    The trunk is all stages of the student but the last; each branch is a last stage and a head. Loss, over branches i
    and with the ensemble z_e = sum_i g_i z_i, whose gate g is of the trunk's averaged feature::

        task(z_e) + sum_i task(z_i) + tau^2 * sum_i KL(softmax(z_e / tau) || softmax(z_i / tau))

    the ensemble being a constant in the last term.

    Args:
        student: with a method `parts()`, to at least two stages and a head. Its own last stage and head are the first
            branch, so that `export` gives the bare student.
        branches: how many in all, at least 2; the paper has 3.
        temperature: tau > 0; the paper has 3.
        task_loss, validation_loss: see `Distiller`.

    Source: Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018 (arXiv:1806.04606).

    Example:
        >>> distiller = ONE(student)
        >>> parts = distiller.losses(distiller.student_outputs(x), None, y)
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        branches: int = 3,
        temperature: float = 3.0,
        task_loss: Loss = cross_entropy,
        validation_loss: Loss | None = None,
    ):
        super().__init__(student, task_loss=task_loss, validation_loss=validation_loss)
        if not hasattr(student, "parts"):
            raise ValueError(
                f"ONE needs a student with a method parts() that tells its stages and head; a {type(student).__name__} "
                "has none."
            )
        if branches < 2:
            raise ValueError(f"branches must be at least 2, the student's and another, got {branches}.")
        stages, head = student.parts()
        if len(stages) < 2:
            raise ValueError(f"ONE needs a student of at least 2 stages, a trunk and a branch, got {len(stages)}.")
        self.temperature = temperature
        self._trunk, self._branch = (
            tuple(stages[:-1]),
            (stages[-1], head),
        )  # tuples: registered as the student's already
        others = (nn.Sequential(*copy.deepcopy([stages[-1], head])) for _ in range(branches - 1))
        self.branches = nn.ModuleList(_fresh(branch) for branch in others)
        with torch.no_grad():
            width = measured_channels(self._trunk, image_of(student, stages, None))[-1]
        self.gate = nn.Sequential(nn.Linear(width, branches), nn.BatchNorm1d(branches), nn.ReLU())

    def student_outputs(self, inputs: Tensor) -> Any:
        """(logits of each branch, gate [batch, branches]); in eval mode the student's logits."""
        if not self.training:
            return self.student(inputs)
        x = inputs
        for stage in self._trunk:
            x = stage(x)
        stage, head = self._branch
        logits = [head(stage(x))] + [branch(x) for branch in self.branches]
        return logits, self.gate(x.mean((2, 3))).softmax(1)

    def ensemble(self, outputs: tuple[list[Tensor], Tensor]) -> Tensor:  # [batch, classes]
        logits, gate = outputs
        return torch.einsum("bi,ibc->bc", gate, torch.stack(logits))

    def logits(self, outputs: Any) -> Tensor:
        return outputs if isinstance(outputs, Tensor) else outputs[0][0]

    def losses(self, outputs: tuple[list[Tensor], Tensor], teacher_outputs: None, targets: Any) -> dict[str, Tensor]:
        ensemble = self.ensemble(outputs)
        taught = (kd_loss(z, ensemble.detach(), student_temperature=self.temperature) for z in outputs[0])
        return {
            "task": self.task_loss(ensemble, targets),
            "branches": sum(self.task_loss(z, targets) for z in outputs[0]),
            "kd": sum(taught),
        }


def _fresh(branch: nn.Module) -> nn.Module:
    """The branch with weights of its own: equal ones would stay nearly equal, nothing to ensemble."""
    for module in branch.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return branch
