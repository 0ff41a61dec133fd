"""FitNet, AT and NST: the task loss, and one loss for each pair of features."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy

from kdfast.losses.pathways import pathway_loss
from kdfast.methods.base import Loss
from kdfast.methods.features import FeatureDistiller, Features, check_weight


class FitNet(FeatureDistiller):
    """Hints: task + weight * mean squared difference of one teacher feature and the student's, projected to it.

    Args:
        student: see `FeatureDistiller`.
        teacher: the same.
        weight: factor on the hint. 100 is the best of Gao et al.'s search on CIFAR-100 (arXiv:1812.01819, table 5).
        layer: which feature, from 0; by default the middle one, as in the paper.
        student_channels, teacher_channels, task_loss, validation_loss: see `FeatureDistiller`.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015 (arXiv:1412.6550), which trains on the hint
    first and on the labels after; in the tables it is compared in, and here, both are trained at once.

    Example:
        >>> distiller = FitNet(student, teacher)
        >>> parts = distiller.losses(distiller.student_outputs(x), distiller.teacher_outputs(x), y)
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        weight: float = 100.0,
        layer: int | None = None,
        student_channels: Sequence[int] | None = None,
        teacher_channels: Sequence[int] | None = None,
        task_loss: Loss = cross_entropy,
        validation_loss: Loss | None = None,
    ):
        super().__init__(
            student,
            teacher,
            student_channels=student_channels,
            teacher_channels=teacher_channels,
            task_loss=task_loss,
            validation_loss=validation_loss,
        )
        count = len(self.student_channels)
        self.layer = count // 2 if layer is None else layer
        if not 0 <= self.layer < count:
            raise ValueError(f"layer must be in [0, {count}), one of the features, got {layer}.")
        self.weight = check_weight("weight", weight)
        self.regressor = nn.Conv2d(self.student_channels[self.layer], self.teacher_channels[self.layer], 1)

    def losses(self, outputs: Features, teacher_outputs: Features, targets: Any) -> dict[str, Tensor]:
        students, teachers = self.maps(outputs, teacher_outputs)
        guided = self.regressor(students[self.layer])
        hint = pathway_loss([guided], [teachers[self.layer]], distance="mse", resize="bilinear")
        return {"task": self.task_loss(outputs[0], targets), "hint": self.weight * hint}


class AT(FeatureDistiller):
    """Attention transfer: task + weight * sum over features of the mean squared difference of their attention maps.

    The attention map of a feature is the sum over its channels of its squares, divided by its 2-norm.

    Args:
        student: see `FeatureDistiller`.
        teacher: the same.
        weight: factor on the sum; the published code's beta for CIFAR.
        student_channels, teacher_channels, task_loss, validation_loss: see `FeatureDistiller`.

    Source: Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017 (arXiv:1612.03928).

    Example:
        >>> distiller = AT(student, teacher)
        >>> parts = distiller.losses(distiller.student_outputs(x), distiller.teacher_outputs(x), y)
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        weight: float = 1000.0,
        student_channels: Sequence[int] | None = None,
        teacher_channels: Sequence[int] | None = None,
        task_loss: Loss = cross_entropy,
        validation_loss: Loss | None = None,
    ):
        super().__init__(
            student,
            teacher,
            student_channels=student_channels,
            teacher_channels=teacher_channels,
            task_loss=task_loss,
            validation_loss=validation_loss,
        )
        self.weight = check_weight("weight", weight)

    def losses(self, outputs: Features, teacher_outputs: Features, targets: Any) -> dict[str, Tensor]:
        students, teachers = self.maps(outputs, teacher_outputs)
        attention = pathway_loss(students, teachers, distance="attention", resize="bilinear")
        return {"task": self.task_loss(outputs[0], targets), "attention": self.weight * attention}


class NST(FeatureDistiller):
    """Neuron selectivity transfer: task + weight * sum over features of the squared maximum mean discrepancy.

    Each channel, divided by its 2-norm over the positions, is a sample; the kernel is the paper's best, (x . y)^2.

    Args:
        student: see `FeatureDistiller`.
        teacher: the same; its channels need not be the student's.
        weight: factor on the sum: 50 as in RepDistiller's benchmark, which normalises as here.
        student_channels, teacher_channels, task_loss, validation_loss: see `FeatureDistiller`.

    Source: Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017
    (arXiv:1707.01219).

    Example:
        >>> distiller = NST(student, teacher)
        >>> parts = distiller.losses(distiller.student_outputs(x), distiller.teacher_outputs(x), y)
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        weight: float = 50.0,
        student_channels: Sequence[int] | None = None,
        teacher_channels: Sequence[int] | None = None,
        task_loss: Loss = cross_entropy,
        validation_loss: Loss | None = None,
    ):
        super().__init__(
            student,
            teacher,
            student_channels=student_channels,
            teacher_channels=teacher_channels,
            task_loss=task_loss,
            validation_loss=validation_loss,
        )
        self.weight = check_weight("weight", weight)

    def losses(self, outputs: Features, teacher_outputs: Features, targets: Any) -> dict[str, Tensor]:
        pairs = zip(*self.maps(outputs, teacher_outputs), strict=True)
        selectivity = sum(squared_mmd(s, t) for s, t in pairs)
        return {"task": self.task_loss(outputs[0], targets), "selectivity": self.weight * selectivity}


def squared_mmd(
    student: Tensor,  # [batch, channels_s, height_s, width_s]
    teacher: Tensor,  # [batch, channels_t, height_t, width_t]
) -> Tensor:  # scalar
    """Squared maximum mean discrepancy of the channels of two maps, for the kernel (x . y)^2; mean over the batch."""
    if student.shape[2:] != teacher.shape[2:]:
        student = F.interpolate(student, teacher.shape[2:], mode="bilinear")
    s, t = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))  # [batch, channels, positions]

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("bip,bjp->bij", x, y).square().mean()

    return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)
