"""CRD: the student's embedding of an image near the teacher's of the same one, far from those of other classes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy

from kdfast.methods.base import Loss
from kdfast.methods.features import FeatureDistiller, Features, as_map, check_weight


class ContrastiveHead(nn.Module):
    """The contrastive loss of two networks' last features, with a memory of every training image's embeddings.

    Each network's last feature, averaged over its positions, goes through a linear layer to a unit vector. An anchor v
    of one network meets the other's stored vector u_0 of the same image and K = `negatives` stored vectors u_k of
    images of other classes, drawn uniformly with replacement; with p_k = exp(u_k . v / tau) / Z and c = K / images::

        loss = -log(p_0 / (p_0 + c)) - sum_k log(c / (p_k + c)),  mean over the batch, summed over the two directions

    Z is fixed by the first batch, to the mean of its exponentials times the number of images. In training the batch's
    vectors then move the stored ones: u <- normalised(momentum * u + (1 - momentum) * v).

    As `MKD`'s `extra_losses` (with ``features=True``) it is CRD + MKD.

    Args:
        student_channels: of the student's last feature.
        teacher_channels: of the teacher's.
        labels: class index [images] of every training image.
        dimension: of the embeddings.
        negatives: K for each image, at least 1.
        temperature: tau > 0.
        momentum: of the memory, in [0, 1).
        weight: factor on the loss.

    Attributes:
        student_memory, teacher_memory: unit vectors [images, dimension], buffers.

    Source: Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020 (arXiv:1910.10699); numbers as
    in its published code.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        labels: Tensor,  # [images]
        *,
        dimension: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        weight: float = 0.8,
    ):
        super().__init__()
        if labels.dim() != 1 or labels.is_floating_point() or len(labels.unique()) < 2:
            raise ValueError(
                "labels must be the class indices [images] of all training images, of at least 2 classes, got "
                f"{labels.dtype} {list(labels.shape)}."
            )
        if negatives < 1 or not temperature > 0 or not 0 <= momentum < 1:
            raise ValueError(
                "negatives must be at least 1, temperature positive and momentum in [0, 1), got "
                f"{negatives}, {temperature} and {momentum}."
            )
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        self.weight = check_weight("weight", weight)
        self.student_embedding = nn.Linear(student_channels, dimension)
        self.teacher_embedding = nn.Linear(teacher_channels, dimension)
        # Images sorted by class: those of other classes are what is left without one stretch of them.
        counts = torch.bincount(labels.cpu().long())
        self.register_buffer("labels", labels.clone().long())
        self.register_buffer("by_class", labels.long().argsort(stable=True))
        self.register_buffer("counts", counts.to(labels.device))
        self.register_buffer("starts", (counts.cumsum(0) - counts).to(labels.device))
        for role in ("student", "teacher"):
            vectors = torch.randn(len(labels), dimension, device=labels.device)
            self.register_buffer(f"{role}_memory", F.normalize(vectors, dim=1))
        self.register_buffer("normaliser", torch.zeros(2))  # Z of each direction, 0 until the first batch

    def draw(
        self,
        indices: Tensor,  # [batch]
    ) -> Tensor:  # [batch, negatives]
        """Images of other classes than those of the given ones."""
        own = self.labels[indices].unsqueeze(1)
        others = len(self.labels) - self.counts[own]  # [batch, 1]
        place = (torch.rand(len(indices), self.negatives, device=own.device) * others).long().clamp(max=others - 1)
        return self.by_class[place + (place >= self.starts[own]) * self.counts[own]]

    def forward(self, outputs: Features, teacher_outputs: Features, targets: Any) -> dict[str, Tensor]:
        """Targets are (labels, indices): `indices` [batch] says which training images these are."""
        if not isinstance(targets, tuple | list) or len(targets) != 2:
            raise ValueError(
                "CRD's training targets must be (labels, indices), the second saying which training images these are, "
                f"got {type(targets).__name__}."
            )
        indices = targets[1]
        student = self._embed(self.student_embedding, outputs[1][-1])
        teacher = self._embed(self.teacher_embedding, teacher_outputs[1][-1])
        candidates = torch.cat([indices.unsqueeze(1), self.draw(indices)], 1)  # [batch, 1 + negatives]
        with torch.autocast(student.device.type, enabled=False):  # exp(1 / 0.07) is more than float16 holds
            loss = self._contrast(0, student, self.teacher_memory, candidates)
            loss = loss + self._contrast(1, teacher, self.student_memory, candidates)
        if self.training:
            self._remember(self.student_memory, indices, student)
            self._remember(self.teacher_memory, indices, teacher)
        return {"contrast": self.weight * loss}

    def _embed(self, layer: nn.Linear, feature: Tensor) -> Tensor:  # [batch, dimension]
        return F.normalize(layer(as_map(feature).mean((2, 3))), dim=1)

    def _contrast(self, direction: int, anchor: Tensor, memory: Tensor, candidates: Tensor) -> Tensor:
        vectors = memory[candidates]  # [batch, 1 + negatives, dimension], a copy
        scores = torch.einsum("bkd,bd->bk", vectors, anchor.to(memory.dtype)) / self.temperature
        images = len(self.labels)
        with (
            torch.no_grad()
        ):  # without waiting for the device: the first batch's value is kept by a choice, not a branch
            z = self.normaliser[direction]
            z = torch.where(z > 0, z, scores.exp().mean().to(z.dtype) * images)
            self.normaliser[direction] = z
        p = scores.exp() / z
        c = (candidates.shape[1] - 1) / images
        near = torch.log(p[:, 0] / (p[:, 0] + c))
        far = (math.log(c) - torch.log(p[:, 1:] + c)).sum(1)
        return -(near + far).mean()

    @torch.no_grad()
    def _remember(self, memory: Tensor, indices: Tensor, vectors: Tensor) -> None:
        moved = self.momentum * memory[indices] + (1 - self.momentum) * vectors.to(memory.dtype)
        memory[indices] = F.normalize(moved, dim=1)


class CRD(FeatureDistiller):
    """Contrastive representation distillation: task + `ContrastiveHead` of the last features.

    Args:
        student: see `FeatureDistiller`; its last feature is compared.
        teacher: the same; features need not pair.
        labels: class index [images] of every training image.
        dimension, negatives, temperature, momentum, weight: see `ContrastiveHead`.
        student_channels, teacher_channels, task_loss, validation_loss: see `FeatureDistiller`.

    Source: Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020 (arXiv:1910.10699).

    Example:
        >>> distiller = CRD(student, teacher, labels=train_labels)
        >>> parts = distiller.losses(distiller.student_outputs(x), distiller.teacher_outputs(x), (y, indices))
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        labels: Tensor,
        dimension: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        weight: float = 0.8,
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
            paired=False,
            task_loss=task_loss,
            validation_loss=validation_loss,
        )
        self.contrast = ContrastiveHead(
            self.student_channels[-1],
            self.teacher_channels[-1],
            labels,
            dimension=dimension,
            negatives=negatives,
            temperature=temperature,
            momentum=momentum,
            weight=weight,
        )

    pools_teacher = True  # of the teacher's features only the mean of the last enters

    def losses(self, outputs: Features, teacher_outputs: Features, targets: Any) -> dict[str, Tensor]:
        contrast = self.contrast(outputs, teacher_outputs, targets)
        return {"task": self.task_loss(outputs[0], targets[0])} | contrast

    def validation_loss(self, outputs: Features, targets: Any) -> Tensor:
        """Targets may be (labels, indices), as in training, or labels."""
        return super().validation_loss(outputs, targets[0] if isinstance(targets, tuple | list) else targets)
