"""What a step reports."""

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.meta.hypergradient import Hypergradient


class MetaStepReport(NamedTuple):
    """What a step did: detached scalar tensors on the student's device, not yet waited for.

    Attributes:
        loss: the training loss the student's step was taken on, before it; of this process's batches.
        parts: its named parts.
        validation_loss: at the student's stepped parameters, before the meta-step; None in a step without one, as
            all that follow.
        meta_gradient_norm: 2-norm of d validation_loss / d meta-parameters, all of them together.
        epsilon: factor of the displacement along w (docs/math/hypergradient.md).
        tangent_error: relative error of the training loss's derivative along w, which is known, with the tangent the
            meta-gradient is made of; about that of the meta-gradient. NaN in a skipped update on the CPU.
        skipped: bool; the meta-gradient was zero along all of the student, or not finite, and zero is in its place.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    validation_loss: Tensor | None = None
    meta_gradient_norm: Tensor | None = None
    epsilon: Tensor | None = None
    tangent_error: Tensor | None = None
    skipped: Tensor | None = None


class Totals:
    """The parts of the training loss, averaged over a step's batches."""

    def __init__(self, loss: Tensor | float = 0.0, parts: dict[str, Tensor] | None = None):
        self.loss, self.parts = loss, parts or {}

    def add(self, parts: dict[str, Tensor], count: int) -> None:
        loss = sum(parts.values()).detach()
        self.loss = loss if count == 1 else self.loss + loss / count
        for name, part in parts.items():
            share = part.detach() if count == 1 else part.detach() / count
            self.parts[name] = self.parts[name] + share if name in self.parts else share

    def report(self, validation_loss=None, found: Hypergradient | None = None) -> MetaStepReport:
        if found is None:
            return MetaStepReport(self.loss, self.parts)
        return MetaStepReport(
            loss=self.loss,
            parts=self.parts,
            validation_loss=validation_loss,
            meta_gradient_norm=torch.stack([h.norm() for h in found.values]).norm(),
            epsilon=found.epsilon,
            tangent_error=found.tangent_error,
            skipped=~found.usable,
        )
