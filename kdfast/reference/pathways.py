"""pathways: the definition of the distances of a list of feature pairs, and its derivatives in closed form.

    loss = sum_p w_p * delta(a_p, b_p),   delta(a, b) of r = a resized to b's height and width, d = r - b

    mse        mean of d^2
    l1         mean of |d|
    hcl        (mean of d^2 + sum_k 2^-k * mean of pool_k(d)^2) / (1 + sum_k 2^-k), pool_k averaging over 4x4, 2x2, 1x1
               adaptive windows; a level that is no smaller than the map's height is left out and not counted
    attention  mean over samples and positions of (A(r)/|A(r)| - A(b)/|A(b)|)^2, A(x) = sum over channels of x^2

Plain PyTorch, one pathway at a time: this is what runs where nothing is compiled, and what every compiled version is
tested against. `pathways` is the definition; `pathways_gradient` and `pathways_hvp` state its derivatives
(docs/math/pathways.md derives them).

Adaptive pooling: for sides that 4 does not divide, neighbouring windows overlap. Attention maps may differ in
channels; one that is zero everywhere has the normalised map 0 and the gradient 0. The mean over nothing is 0.

Source: hcl: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021 (arXiv:2104.09044), and the weights of
its published code; attention: Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017
(arXiv:1612.03928); the weighted sum: Deng et al., "DistPro", ECCV 2022 (arXiv:2204.05547), equation 2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.reference.kd_kl import accumulate_dtype

MSE, L1, HCL, ATTENTION = 0, 1, 2, 3
NEAREST, BILINEAR = 0, 1
DISTANCES = {"mse": MSE, "l1": L1, "hcl": HCL, "attention": ATTENTION}
RESIZES = {"nearest": NEAREST, "bilinear": BILINEAR}
LEVELS = (4, 2, 1)


def pathways(
    students: Sequence[Tensor],  # of [batch_p, channels_p, height_p, width_p]
    teachers: Sequence[Tensor],  # of the same but for height and width, and for attention the channels
    keep: Tensor | None = None,  # [pathways] bool; the distance of the others is 0
    distance: int = HCL,
    resize: int = NEAREST,
) -> Tensor:  # [pathways]
    """The distance of each pathway, in fp32 (fp64 for fp64 maps)."""
    of = {MSE: mse, L1: l1, HCL: hcl, ATTENTION: attention}[distance]
    values = torch.stack([of(resized(a, b, resize), b.to(_wide(b))) for a, b in zip(students, teachers, strict=True)])
    return values if keep is None else torch.where(keep, values, 0.0)


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    return _mean((student - teacher).square())


def l1(student: Tensor, teacher: Tensor) -> Tensor:
    return _mean((student - teacher).abs())


def hcl(
    student: Tensor,  # [batch, channels, height, width]
    teacher: Tensor,  # [batch, channels, height, width]
) -> Tensor:  # scalar
    """The hierarchical context loss of two feature maps."""
    difference = student.to(_wide(student)) - teacher.to(_wide(teacher))  # pooling is linear: one map to pool, not two
    loss, shares = _mean(difference.square()), level_shares(difference.shape[2])
    for level, share in shares:
        loss = loss + share * _mean(F.adaptive_avg_pool2d(difference, level).square())
    return loss / (1 + sum(share for _, share in shares))


def level_shares(height: int) -> list[tuple[int, float]]:
    """The pooled levels used and their weights: 1/2, 1/4, 1/8 in the order of those that are used."""
    used = [level for level in LEVELS if level < height]
    return [(level, 0.5 ** (k + 1)) for k, level in enumerate(used)]


def attention(
    student: Tensor,  # [batch, channels, height, width]
    teacher: Tensor,  # [batch, other channels, height, width]
) -> Tensor:  # scalar
    """How far apart the normalised maps of the features' energy are."""
    return _mean((_unit(_energy(student))[0] - _unit(_energy(teacher))[0]).square())


def resized(
    student: Tensor,  # [batch, channels, h, w]
    teacher: Tensor,  # [batch, ..., height, width]
    resize: int,
) -> Tensor:  # [batch, channels, height, width], in the type of the arithmetic
    """The student's map in the teacher's size; F.interpolate, with align_corners=False."""
    x, size = student.to(_wide(student)), teacher.shape[2:]
    if x.shape[2:] == size:
        return x
    if resize == BILINEAR:
        return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
    for dim in (2, 3):
        x = x.index_select(dim, nearest_sources(x.shape[dim], size[dim - 2], x.device))
    return x


def nearest_sources(size: int, out: int, device: torch.device) -> Tensor:  # [out] int64
    """The source of each position, as F.interpolate(mode="nearest") of fp32 finds it: floor(i * size / out) in fp32,
    which for some sizes is one less than in exact arithmetic. For fp64 maps the same."""
    ratio = torch.full((), size, dtype=torch.float32, device=device) / out  # filled there: a copy would be waited for
    return (torch.arange(out, dtype=torch.float32, device=device) * ratio).floor().long().clamp(max=size - 1)


# ---------------------------------------------------------------- first derivatives
def pathways_gradient(
    grad: Tensor,  # [pathways]
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    keep: Tensor | None,
    distance: int,
    resize: int,
) -> tuple[list[Tensor], list[Tensor]]:  # shaped like students and teachers, in the type of the arithmetic
    """d sum_p grad_p delta_p / d (students, teachers).

    With J(d) the gradient in d (mse: 2 d / n; l1: sign(d) / n; hcl: the same sum over levels, each pooled, squared and
    spread back), da = resize^T J, db = -J. For attention, u = A(r)/|A(r)|, v of the teacher's, n = samples * positions:

        d/dA(r) = 2/n (e - u <u, e>) / |A(r)|  with e = u - v,      dA/dr = 2 r
    """
    pairs = []
    for p, (a, b) in enumerate(zip(students, teachers, strict=True)):
        r, b = resized(a, b, resize), b.to(_wide(b))
        if distance == ATTENTION:
            u, v = _unit(_energy(r)), _unit(_energy(b))
            dr, db = _times(2 * _energy_gradient(u, v), r), _times(2 * _energy_gradient(v, u), b)
        else:
            dr = _difference_gradient(r - b, distance)
            db = -dr
        pairs.append([_masked(grad, keep, p, x) for x in (_resize_adjoint(dr, a, resize), db)])
    return [da for da, _ in pairs], [db for _, db in pairs]


def pathways_hvp(
    grad: Tensor,  # [pathways]
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    keep: Tensor | None,
    distance: int,
    resize: int,
    direction: tuple[Sequence[Tensor | None], Sequence[Tensor | None]],  # shaped like students and teachers
) -> tuple[list[Tensor], list[Tensor]]:
    """The Hessian of sum_p grad_p delta_p in all maps times `direction`, same shapes.

    For mse and hcl the gradient is linear in the maps, so this is the gradient at `direction`; for l1 it is zero. For
    attention, a dot being the derivative along the direction, g = d/dA(r) and A. = 2 sum over channels of r r.:

        u. = (A. - u <u, A.>) / |A|      (d/dr). = 2 (g. r + g r.)
        g. = (2/n) (e. - u. <u, e> - u (<u., e> + <u, e.>)) / |A| - g <u, A.> / |A|
    """
    dots = [
        [torch.zeros_like(x) if w is None else w for w, x in zip(ws, xs, strict=True)]
        for ws, xs in zip(direction, (students, teachers), strict=True)
    ]
    if distance == L1:
        return tuple([torch.zeros_like(x, dtype=_wide(x)) for x in xs] for xs in (students, teachers))
    if distance != ATTENTION:
        return pathways_gradient(grad, *dots, keep, distance, resize)
    pairs = []
    for p, (a, b, a_dot, b_dot) in enumerate(zip(students, teachers, *dots, strict=True)):
        r, b, r_dot, b_dot = resized(a, b, resize), b.to(_wide(b)), resized(a_dot, b, resize), b_dot.to(_wide(b))
        u, v = _unit(_energy(r)), _unit(_energy(b))
        u_dot, v_dot = _unit_dot(u, r, r_dot), _unit_dot(v, b, b_dot)
        dr = 2 * (
            _times(_energy_gradient_dot(u, v, u_dot, v_dot), r) + _times(_energy_gradient(u, v), r_dot)
        )  # fmt: skip
        db = 2 * (_times(_energy_gradient_dot(v, u, v_dot, u_dot), b) + _times(_energy_gradient(v, u), b_dot))
        pairs.append([_masked(grad, keep, p, x) for x in (_resize_adjoint(dr, a, resize), db)])
    return [da for da, _ in pairs], [db for _, db in pairs]


def _difference_gradient(d: Tensor, distance: int) -> Tensor:
    n = max(d.numel(), 1)
    if distance == L1:
        return d.sign() / n
    gradient = 2 * d / n
    if distance == MSE:
        return gradient
    shares = level_shares(d.shape[2])
    for level, share in shares:
        rows, columns = (_pooling(level, size, d) for size in d.shape[2:])  # [level, height], [level, width]
        pooled = rows @ d @ columns.T
        gradient = gradient + rows.T @ (2 * share / max(pooled.numel(), 1) * pooled) @ columns
    return gradient / (1 + sum(share for _, share in shares))


def _pooling(level: int, size: int, like: Tensor) -> Tensor:  # [level, size]
    """Adaptive average pooling of one side as a matrix."""
    identity = torch.eye(size, dtype=like.dtype, device=like.device)
    return F.adaptive_avg_pool1d(identity, level).T


def _resize_adjoint(dr: Tensor, student: Tensor, resize: int) -> Tensor:
    """The gradient in the student's map from that in the resized one."""
    if dr.shape[2:] == student.shape[2:]:
        return dr
    rows, columns = (_resizing(i, o, dr, resize) for i, o in zip(student.shape[2:], dr.shape[2:], strict=True))
    return rows.T @ dr @ columns


def _resizing(size: int, out: int, like: Tensor, resize: int) -> Tensor:  # [out, size]
    """Resizing of one side as a matrix."""
    identity = torch.eye(size, dtype=like.dtype, device=like.device)
    if resize == NEAREST:
        return identity.index_select(0, nearest_sources(size, out, like.device))
    return F.interpolate(identity.unsqueeze(0), size=out, mode="linear", align_corners=False)[0].T


def _energy(x: Tensor) -> Tensor:  # [batch, positions]
    return x.square().sum(1).flatten(1)


def _unit(energy: Tensor) -> tuple[Tensor, Tensor]:
    """(the map divided by its norm [batch, positions], 1 / norm [batch, 1]), both 0 where the norm is."""
    norm = torch.linalg.vector_norm(energy, dim=1, keepdim=True)
    zero = norm == 0
    inverse = (1 / norm.masked_fill(zero, 1)).masked_fill(zero, 0)
    return energy * inverse, inverse


def _inner(x: Tensor, y: Tensor) -> Tensor:  # [batch, 1]
    return (x * y).sum(1, keepdim=True)


def _energy_gradient(own, other) -> Tensor:  # [batch, positions]
    (u, inverse), (v, _) = own, other
    e = u - v
    return 2 / max(u.numel(), 1) * (e - u * _inner(u, e)) * inverse


def _unit_dot(own, x: Tensor, x_dot: Tensor) -> tuple[Tensor, Tensor]:
    """(u., <u, A.> / |A|), that is the relative change of the norm."""
    u, inverse = own
    energy_dot = 2 * (x * x_dot).sum(1).flatten(1)
    along = _inner(u, energy_dot)
    return (energy_dot - u * along) * inverse, along * inverse


def _energy_gradient_dot(own, other, own_dot, other_dot) -> Tensor:  # [batch, positions]
    (u, inverse), (v, _), (u_dot, norm_dot), (v_dot, _) = own, other, own_dot, other_dot
    e, e_dot = u - v, u_dot - v_dot
    change = e_dot - u_dot * _inner(u, e) - u * (_inner(u_dot, e) + _inner(u, e_dot))
    return 2 / max(u.numel(), 1) * change * inverse - _energy_gradient(own, other) * norm_dot


def _times(per_position: Tensor, x: Tensor) -> Tensor:
    return per_position.unflatten(1, (1, *x.shape[2:])) * x


def _masked(grad: Tensor, keep: Tensor | None, p: int, x: Tensor) -> Tensor:
    return grad[p] * x if keep is None else torch.where(keep[p], grad[p] * x, 0.0)


def _mean(x: Tensor) -> Tensor:
    return x.sum() / max(x.numel(), 1)


def _wide(x: Tensor) -> torch.dtype:
    return accumulate_dtype(x.dtype)
