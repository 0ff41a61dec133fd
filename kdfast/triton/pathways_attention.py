"""pathways' attention distance in Triton: what stands below kdfast/triton/pathways.py for it.

    A(x) = sum over channels of x^2,  M = A / |A|,   delta = mean over samples and positions of (M(a) - M(b))^2
    d delta / da = 2 a (u - M(a) <u, M(a)>) / |A(a)|,  u = 2 (M(a) - M(b)) / (samples positions); for b with -u

Kernels make A and multiply the maps; between them PyTorch's own operations treat A, one number for all channels of a
position. A map of norm zero has M = 0 and gradient 0.
Memory for a pair of n elements of b bytes: forward reads 2 n b; backward reads 2 n b for A, and for a gradient reads
n b again and writes n b.
Source: Zagoruyko, Komodakis 2017 (arXiv:1612.03928).
"""

import torch
import triton
import triton.language as tl

from kdfast.triton._resize import SIZES, arithmetic, gather, load_resized, scales


@triton.jit(do_not_specialize=[*SIZES])
def squares_kernel(
    maps,  # [samples, channels, in_height, in_width]
    energy,  # [samples, height * width]
    keep,  # [1], or None
    channels, height, width, in_height, in_width, stride_n, stride_c, stride_y, stride_x, scale_y, scale_x,
    RESIZED: tl.constexpr, BILINEAR: tl.constexpr, ACC: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    if keep is not None:  # noqa: SIM102  (known when compiling)
        if not tl.load(keep).to(tl.int1):
            return
    sample = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < height * width
    y, x = (at // width)[None, :], (at % width)[None, :]
    sum = tl.zeros([TILE], ACC)
    for begin in range(0, channels, CHANNELS):
        channel = (begin + tl.arange(0, CHANNELS))[:, None]
        value = load_resized(
            maps, sample * stride_n + channel * stride_c, y, x, (channel < channels) & inside[None, :],
            stride_y, stride_x, in_height, in_width, height, width, scale_y, scale_x, RESIZED, BILINEAR, ACC,
        )  # fmt: skip
        sum += tl.sum(value * value, 0)
    tl.store(energy + sample * (height * width) + at, sum, mask=inside)


@triton.jit(do_not_specialize=[*SIZES])
def scale_kernel(
    maps,  # [samples, channels, in_height, in_width]
    factor,  # [samples, height * width]
    out,  # like maps, or where they are resized [samples, channels, height, width] in the type of the arithmetic
    keep,  # [1], or None
    channels, height, width, in_height, in_width, stride_n, stride_c, stride_y, stride_x,
    out_n, out_c, out_y, out_x, scale_y, scale_x,
    RESIZED: tl.constexpr, BILINEAR: tl.constexpr, ACC: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out = resized maps * factor of their position."""
    kept = True
    if keep is not None:
        kept = tl.load(keep).to(tl.int1)
    sample = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < height * width
    by = tl.load(factor + sample * (height * width) + at, mask=inside & kept, other=0.0)[None, :]
    y, x = (at // width)[None, :], (at % width)[None, :]
    for begin in range(0, channels, CHANNELS):
        channel = (begin + tl.arange(0, CHANNELS))[:, None]
        mask = (channel < channels) & inside[None, :]
        value = load_resized(
            maps, sample * stride_n + channel * stride_c, y, x, mask & kept,
            stride_y, stride_x, in_height, in_width, height, width, scale_y, scale_x, RESIZED, BILINEAR, ACC,
        )  # fmt: skip
        to = sample * out_n + channel * out_c + y * out_y + x * out_x
        tl.store(out + to, (value * by).to(out.dtype.element_ty), mask=mask)


def attention(student, teacher, keep, _, bilinear, accumulate, coefficient, parts, by_student, by_teacher, __):
    positions = teacher.shape[2] * teacher.shape[3]
    grid = triton.cdiv(positions, 64), teacher.shape[0]
    tile = {"BILINEAR": bilinear, "ACC": arithmetic(accumulate), "CHANNELS": 16, "TILE": 64, "num_warps": 4}
    maps = []
    for x in (student, teacher):
        energy = x.new_zeros(x.shape[0], positions, dtype=accumulate)
        squares_kernel[grid](
            x, energy, keep, x.shape[1], *teacher.shape[2:], *x.shape[2:], *x.stride(), *scales(x, teacher),
            RESIZED=x.shape[2:] != teacher.shape[2:], **tile,
        )  # fmt: skip
        norm = torch.linalg.vector_norm(energy, dim=1, keepdim=True)
        inverse = torch.where(norm == 0, 0.0, 1 / norm)
        maps.append((energy * inverse, inverse))
    difference = maps[0][0] - maps[1][0]  # zero where the pathway is dropped
    for x, out, (unit, inverse), sign in zip((student, teacher), (by_student, by_teacher), maps, (1, -1), strict=True):
        if out is None:
            continue
        along = (unit * difference).sum(1, keepdim=True)
        factor = coefficient.to(accumulate) * (4 * sign / difference.numel()) * inverse * (difference - unit * along)
        resized = x.shape[2:] != teacher.shape[2:]
        to = x.new_empty(*x.shape[:2], *teacher.shape[2:], dtype=accumulate) if resized else out
        scale_kernel[grid](
            x, factor, to, keep, x.shape[1], *teacher.shape[2:], *x.shape[2:], *x.stride(), *to.stride(),
            *scales(x, teacher), RESIZED=resized, **tile,
        )  # fmt: skip
        if resized:
            gather(to, x, teacher, out, bilinear, accumulate)
    if parts is not None:
        parts[0] = difference.square().mean()
