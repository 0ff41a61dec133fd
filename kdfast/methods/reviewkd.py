"""ReviewKD: the student's features, fused from the deepest up, against the teacher's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy

from kdfast.losses.pathways import hcl
from kdfast.methods.base import Loss
from kdfast.methods.features import FeatureDistiller, Features, check_weight

WIDEST = 512  # channels of the fused features at most, as in the published code


class ABF(nn.Module):
    """Attention-based fusion of a student's feature with what came out of the next deeper one.

    Args:
        in_channels: of the student's feature.
        mid_channels: of the fused feature.
        out_channels: of the teacher's.
        fuse: whether there is a deeper one.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, fuse: bool):
        super().__init__()
        self.project = _conv_norm(in_channels, mid_channels, 1)
        self.attention = nn.Conv2d(2 * mid_channels, 2, 1) if fuse else None  # begins as PyTorch's, as published
        self.out = _conv_norm(mid_channels, out_channels, 3)

    def forward(
        self,
        feature: Tensor,  # [batch, in_channels, height, width]
        deeper: Tensor | None,  # [batch, mid_channels, height_d, width_d]
        size: Sequence[int],  # the teacher's (height, width)
    ) -> tuple[Tensor, Tensor]:
        """What is compared with the teacher [batch, out_channels, *size], and what goes to the next shallower one."""
        x = self.project(feature)
        if self.attention is not None:
            y = _resized(deeper, x.shape[2:])
            share = torch.sigmoid(self.attention(torch.cat([x, y], 1)))  # [batch, 2, height, width]
            x = x * share[:, :1] + y * share[:, 1:]
        x = _resized(x, size)
        return self.out(x), x


class ReviewKD(FeatureDistiller):
    """Knowledge review: task + weight * hierarchical context loss of the fused features, over all levels.

    The levels are the features and, deepest, the last feature averaged over its positions.

    Args:
        student: see `FeatureDistiller`.
        teacher: the same.
        weight: factor on the review. The published settings: 0.6 and 1 for ResNets, 5 for wide ResNets and ResNet
            8x4, 5 and 8 for ShuffleNets on CIFAR-100, 1 and 8 on ImageNet; this default is its ResNet-34 to ResNet-18.
        warmup_epochs: in which the weight rises in a line from 0, where a trainer calls `start_epoch`; the published
            code has 20.
        student_channels, teacher_channels, task_loss, validation_loss: see `FeatureDistiller`.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021 (arXiv:2104.09044), and the layers of
    its published code.

    Example:
        >>> distiller = ReviewKD(student, teacher, weight=5.0)
        >>> parts = distiller.losses(distiller.student_outputs(x), distiller.teacher_outputs(x), y)
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        weight: float = 1.0,
        warmup_epochs: int = 20,
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
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be at least 0, got {warmup_epochs}.")
        self.weight, self.warmup_epochs = check_weight("weight", weight), warmup_epochs
        self._warm = 1.0  # of a trainer that does not tell the epochs: no warm-up
        narrow = (*self.student_channels, self.student_channels[-1])
        wide = (*self.teacher_channels, self.teacher_channels[-1])
        mid = min(WIDEST, narrow[-1])
        self.fusions = nn.ModuleList(
            ABF(a, mid, b, fuse=level + 1 < len(narrow)) for level, (a, b) in enumerate(zip(narrow, wide, strict=True))
        )

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self._warm = min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else 1.0

    def review(self, outputs: Features, teacher_outputs: Features) -> tuple[list[Tensor], list[Tensor]]:
        """The pairs that are compared, from the shallowest level to the pooled one."""
        students, teachers = self.maps(outputs, teacher_outputs)
        students, teachers = ([*maps, maps[-1].mean((2, 3), keepdim=True)] for maps in (students, teachers))
        fused, deeper = [], None
        for fusion, s, t in zip(reversed(self.fusions), reversed(students), reversed(teachers), strict=True):
            out, deeper = fusion(s, deeper, t.shape[2:])
            fused.insert(0, out)
        return fused, teachers

    def losses(self, outputs: Features, teacher_outputs: Features, targets: Any) -> dict[str, Tensor]:
        review = hcl(*self.review(outputs, teacher_outputs))
        return {"task": self.task_loss(outputs[0], targets), "review": self._warm * self.weight * review}


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return x if x.shape[2:] == tuple(size) else F.interpolate(x, tuple(size), mode="nearest")


def _conv_norm(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))
