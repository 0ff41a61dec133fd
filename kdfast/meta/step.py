"""meta_kd_step: one step of the student and one of the meta-parameters."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from kdfast.meta.engine import MetaKD, MetaStepReport
from kdfast.meta.tangents import Batch


def meta_kd_step(
    distiller: nn.Module,
    train_batch: Batch | list[Batch],  # inputs [batch, ...], targets [batch]
    validation_batch: Batch,  # inputs [batch, ...], targets [batch]
    optimizer: Optimizer,
    meta_optimizer: Optimizer,
    *,
    tangent: str | None = None,
    commit: str = "reuse",
    fraction: float = 1.0,
    radius: float | None = None,
    max_norm: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
    teacher_outputs: Any = None,
) -> MetaStepReport:
    """Train the student one step, and its meta-parameters on the validation loss which that step leads to.

    `MetaKD` for a single step; that class has what needs a memory of earlier ones besides (a rolling validation batch,
    updates every so many steps), and says what the options mean.

    Args:
        distiller: a `kdfast.methods.Distiller`, in train mode.
        train_batch: (inputs, targets) of the student's step; or a list of such, accumulated into one step.
        validation_batch: (inputs, targets) held out from training.
        optimizer: torch.optim SGD, Adam or AdamW of `distiller.inner_parameters()`, with any parameter groups.
        meta_optimizer: of `distiller.meta_parameters()`; any.
        tangent: "forward", "central", "jvp", "exact"; by default "forward", or "central" in 16 bits.
        commit: "reuse", "rehead", "separate".
        fraction: share of the train batch that the meta-gradient is taken on.
        radius: relative size of the displacement, > 0; by default chosen by `tangent` and precision.
        max_norm: 2-norm that the student's gradient is clipped to.
        scaler: of float16 training.
        teacher_outputs: of the train inputs, where they are at hand; by default the teacher is asked.

    Returns:
        MetaStepReport.

    Raises:
        ValueError, TypeError: one sentence saying what was expected and what came.

    Source: see `MetaKD`.

    Example:
        >>> optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.05, momentum=0.9)
        >>> meta_optimizer = torch.optim.AdamW(distiller.meta_parameters(), lr=3e-4)
        >>> report = meta_kd_step(distiller, (x, y), (x_val, y_val), optimizer, meta_optimizer)
        >>> report.validation_loss, report.tangent_error
    """
    engine = MetaKD(
        distiller, optimizer, meta_optimizer, tangent=tangent, commit=commit, fraction=fraction, radius=radius,
        max_norm=max_norm, scaler=scaler,
    )  # fmt: skip
    return engine.step(train_batch, validation_batch, teacher_outputs=teacher_outputs)
