"""perturb: all parameters of a network displaced along a direction, by a size relative to their own.

    w_l = factor_l v_l
    ahead_l = theta_l + epsilon w_l,   behind_l = theta_l - epsilon w_l,   slope = sum_l <g_l, w_l>

    epsilon = radius / sqrt( sum_l (|w_l| / d_l)^2 )
    d_l = max(|theta_l|, SMALLEST_RMS sqrt(numel))  for weights (2 dimensions and more),  sqrt(numel)  for vectors

Where that root is zero or not finite, epsilon is 0 and both points are theta. A tensor without elements adds
nothing. Why this size: docs/math/hypergradient.md.
"""

import torch
from torch import Tensor

from kdfast.reference.kd_kl import accumulate_dtype

SMALLEST_RMS = 1e-3  # a weight initialised to zero counts as this, or it alone would stop the displacement


def perturb(
    theta: list[Tensor],
    gradients: list[Tensor],  # g, shaped like theta
    v: list[Tensor],  # shaped like theta
    factors: list[float],  # w = factor * v
    radius: float,
    both: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(ahead, behind or nothing, [2] = (epsilon, slope)); in fp32, or fp64 if any theta is; stored as theta is."""
    real = max((accumulate_dtype(t.dtype) for t in theta), key=lambda dtype: dtype.itemsize)
    w = [f * x.to(real) for f, x in zip(factors, v, strict=True)]
    relative = torch.stack([_size(t.to(real), x) for t, x in zip(theta, w, strict=True)])
    norm = torch.linalg.vector_norm(relative)
    epsilon = radius / norm
    epsilon = torch.where((norm > 0) & norm.isfinite() & epsilon.isfinite(), epsilon, 0.0)
    slope = torch.stack([(g.to(real) * x).sum() for g, x in zip(gradients, w, strict=True)]).sum()
    points = [
        [
            torch.where(epsilon == 0, t, t.to(real) + sign * epsilon * x).to(t.dtype)
            for t, x in zip(theta, w, strict=True)
        ]
        for sign in ((1, -1) if both else (1,))
    ]
    return points[0], points[1] if both else [], torch.stack([epsilon, slope])


def _size(theta: Tensor, w: Tensor) -> Tensor:
    """|w| / d, a scalar."""
    rms = torch.linalg.vector_norm(w) / max(w.numel(), 1) ** 0.5
    if theta.dim() < 2:
        return rms
    return rms / (torch.linalg.vector_norm(theta) / max(theta.numel(), 1) ** 0.5).clamp(min=SMALLEST_RMS)
