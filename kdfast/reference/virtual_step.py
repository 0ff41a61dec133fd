"""virtual_step: where a step of torch.optim.SGD would lead, out of place.

d = g + weight_decay theta
b = momentum buffer + (1 - dampening) d        in the first step, without a buffer, b = d
theta+ = theta - lr (d without momentum | d + momentum b with Nesterov's | b)
"""

import torch
from torch import Tensor

from kdfast.reference.kd_kl import accumulate_dtype


def virtual_step(
    theta: list[Tensor],
    gradients: list[Tensor],  # g, shaped like theta
    buffers: list[Tensor],  # shaped like theta, or none at all
    lr: float,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
) -> list[Tensor]:
    """theta+, computed in fp32 (fp64 if theta is) and stored as theta is."""
    dtypes = [t.dtype for t in theta]
    theta, gradients, buffers = (
        [x.to(accumulate_dtype(x.dtype)) for x in tensors] for tensors in (theta, gradients, buffers)
    )
    d = torch._foreach_add(gradients, theta, alpha=weight_decay) if weight_decay else gradients
    if momentum:
        b = d
        if buffers:
            b = torch._foreach_add(torch._foreach_mul(buffers, momentum), d, alpha=1 - dampening)
        d = torch._foreach_add(d, b, alpha=momentum) if nesterov else b
    return [x.to(dtype) for x, dtype in zip(torch._foreach_sub(theta, d, alpha=lr), dtypes, strict=True)]
