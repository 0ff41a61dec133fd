"""perturb: schema, fake, and the Python side. The definition stands in kdfast/reference/perturb.py.

One dispatcher op over lists of tensors, with CPU (C++), CUDA (C++) and reference kernels; Triton has none, as a kernel
there takes no list of tensors. Two sweeps: norms and dots (reads theta, g, v), then the points (reads theta, v; writes
one or two). Everything stays on the device. It is evaluated on constants: there is no gradient.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.ops.kd_kl import LIB
from kdfast.reference.kd_kl import accumulate_dtype
from kdfast.reference.perturb import perturb as reference_perturb

LIB.define(
    "perturb(Tensor[] theta, Tensor[] gradients, Tensor[] v, float[] factors, float radius, bool both) "
    "-> (Tensor[] ahead, Tensor[] behind, Tensor summary)"
)


def _reference(theta, *args):
    ahead, behind, summary = reference_perturb(theta, *args)
    # the layout is part of the op
    ahead, behind = (
        [torch.empty_like(t).copy_(x) for t, x in zip(theta, point, strict=False)] for point in (ahead, behind)
    )
    return ahead, behind, summary


def _fake(theta, gradients, v, factors, radius, both):
    points = [[torch.empty_like(t) for t in theta] for _ in range(2)]
    return points[0], points[1] if both else [], theta[0].new_empty(2, dtype=accumulate_dtype(theta[0].dtype))


LIB.impl("perturb", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("kdfast::perturb", _fake, lib=LIB)


class Perturbed(NamedTuple):
    """The points theta + epsilon w and, if asked for, theta - epsilon w; epsilon and <g, w> as scalars."""

    ahead: list[Tensor]
    behind: list[Tensor]
    epsilon: Tensor
    slope: Tensor


def perturb(
    theta: Sequence[Tensor],  # at least one, of any shapes
    gradients: Sequence[Tensor],  # g, shaped like theta
    v: Sequence[Tensor],  # shaped like theta
    factors: Sequence[float],  # w = factor * v
    radius: float,
    both: bool,
) -> Perturbed:
    """The displacement of relative size `radius` along w. Tensors of one device and type are swept together.

    Raises:
        RuntimeError: if a gradient would be wanted.
    """
    check_no_gradient("perturb", theta, gradients, v)
    lists = [list(x) for x in (theta, gradients, v)]
    if uniform(*lists):
        out = torch.ops.kdfast.perturb(*like_the_first(*lists), list(factors), radius, both)
    else:
        out = reference_perturb(*lists, list(factors), radius, both)
    ahead, behind, summary = out
    return Perturbed(ahead, behind, summary[0], summary[1])


# ---------------------------------------------------------------- what ops over lists of tensors share
def check_no_gradient(name: str, *lists: Sequence[Tensor]) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for tensors in lists for x in tensors):
        raise RuntimeError(
            f"{name} takes constants and has no gradient, got a tensor that requires one; call it under "
            "torch.no_grad(), or write the formula in PyTorch where its derivative is wanted."
        )


def uniform(*lists: list[Tensor]) -> bool:
    """Whether all tensors have one type and device, as a sweep over them wants."""
    first = lists[0][0]
    return all(x.dtype == first.dtype and x.device == first.device for tensors in lists for x in tensors)


def like_the_first(first: list[Tensor], *others: list[Tensor]) -> list[list[Tensor]]:
    """The lists, each tensor filling its memory in the same order of elements as the one of the first list."""
    formats = [_memory_format(x) for x in first]
    return [
        [x.contiguous(memory_format=f) for x, f in zip(tensors, formats, strict=True)] for tensors in (first, *others)
    ]


def _memory_format(x: Tensor) -> torch.memory_format:
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
