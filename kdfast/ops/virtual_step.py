"""virtual_step: schema, fake, and the Python side. The definition stands in kdfast/reference/virtual_step.py.

One dispatcher op over lists of tensors, with CPU (C++), CUDA (C++) and reference kernels; Triton has none, as a kernel
there takes no list of tensors. One sweep: reads theta, g and the momentum buffer, writes theta+. It is evaluated on
constants: there is no gradient (`kdfast.meta.inner` differentiates the same rule, written in PyTorch).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.ops.kd_kl import LIB
from kdfast.ops.perturb import check_no_gradient, like_the_first, uniform
from kdfast.reference.virtual_step import virtual_step as reference_virtual_step

LIB.define(
    "virtual_step(Tensor[] theta, Tensor[] gradients, Tensor[] buffers, float lr, float weight_decay, float momentum, "
    "float dampening, bool nesterov) -> Tensor[]"
)


def _reference(theta, *args):
    return [torch.empty_like(t).copy_(x) for t, x in zip(theta, reference_virtual_step(theta, *args), strict=True)]


LIB.impl("virtual_step", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("kdfast::virtual_step", lambda theta, *args: [torch.empty_like(t) for t in theta], lib=LIB)


def virtual_step(
    theta: Sequence[Tensor],  # at least one, of any shapes
    gradients: Sequence[Tensor],  # g, shaped like theta
    buffers: Sequence[Tensor],  # shaped like theta, or none at all
    lr: float,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
) -> list[Tensor]:
    """theta+ of one step of SGD. Tensors of one device and type are swept together.

    Raises:
        RuntimeError: if a gradient would be wanted.
    """
    check_no_gradient("virtual_step", theta, gradients, buffers)
    lists, constants = [list(theta), list(gradients), list(buffers)], (lr, weight_decay, momentum, dampening, nesterov)
    if not uniform(*lists):
        return reference_virtual_step(*lists, *constants)
    if lists[2]:
        return torch.ops.kdfast.virtual_step(*like_the_first(*lists), *constants)
    return torch.ops.kdfast.virtual_step(*like_the_first(*lists[:2]), [], *constants)
