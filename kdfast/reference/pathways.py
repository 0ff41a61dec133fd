"""pathways: the definition of the weighted sum of feature distances, one a pathway.

    loss = sum_p w_p * hcl(a_p, b_p)

`hcl` is the hierarchical context loss: the mean squared difference of two feature maps, at full
resolution with weight 1 and pooled to 4x4, 2x2 and 1x1 with weights 1/2, 1/4, 1/8. A level that is
no smaller than the map is left out, and the weights are counted over the levels used; their sum
divides the loss. Adaptive pooling: for sides that 4 does not divide, neighbouring windows overlap.

Source: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021 (arXiv:2104.09044), and the
weights of its published code; the weighted sum is DistPro's (arXiv:2204.05547), equation 2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = (4, 2, 1)


def hcl(
    student: Tensor,  # [batch, channels, height, width]
    teacher: Tensor,  # [batch, channels, height, width]
) -> Tensor:  # scalar
    """The hierarchical context loss of two feature maps, in fp32 (fp64 for fp64 maps)."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    difference = student.to(dtype) - teacher.to(dtype)  # pooling is linear: one map to pool, not two
    loss, weight, total = difference.square().mean(), 1.0, 1.0
    for level in LEVELS:
        if level < student.shape[2]:
            weight /= 2
            total += weight
            loss = loss + weight * F.adaptive_avg_pool2d(difference, level).square().mean()
    return loss / total


def pathway_losses(
    students: Sequence[Tensor],  # of [batch, channels_p, height_p, width_p], transformed to the teacher's shape
    teachers: Sequence[Tensor],  # the same shapes
) -> Tensor:  # [pathways]
    """The distance of each pathway."""
    return torch.stack([hcl(a, b) for a, b in zip(students, teachers, strict=True)])


def pathways(
    students: Sequence[Tensor],  # of [batch, channels_p, height_p, width_p]
    teachers: Sequence[Tensor],  # the same shapes
    weights: Tensor,  # [pathways]
) -> Tensor:  # scalar
    """The weighted sum. Linear in the weights, whose gradient is `pathway_losses`."""
    return (weights * pathway_losses(students, teachers)).sum()
