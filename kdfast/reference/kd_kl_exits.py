"""The definition of kd_kl_exits: kd_kl of each exit, by itself."""

import torch
from torch import Tensor

from kdfast.reference.kd_kl import Options, kd_kl


def kd_kl_exits(
    students: list[Tensor],  # exits of [rows, classes]
    teachers: list[Tensor],  # exits of [rows, classes]
    labels: Tensor | None,  # [rows] int64, of all exits
    options: Options,
    coefficient: float,
) -> Tensor:  # [exits]
    """coefficient * sum of the row losses, for each exit."""
    rows = [kd_kl(s, t, None, None, labels, None, None, options) for s, t in zip(students, teachers, strict=True)]
    return coefficient * torch.stack([x.sum() for x in rows])
