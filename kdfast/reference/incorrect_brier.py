"""incorrect_brier: the definition, and its first and second derivatives in closed form.

    p = softmax(logits),  a = p - y                y: the labelled class's one-hot vector, or given probabilities
    loss = sum a^2   where argmax(logits) != argmax(y),  else 0

Equal logits count as the first of them, in y too, as torch.argmax has it. The loss jumps where the prediction
changes; its derivatives are those of the piece a row lies on (docs/math/incorrect_brier.md).

A masked class (-inf) has probability zero. A row whose label is ignore_index counts for nothing, whatever its
logits hold; one whose label is out of range, or with a NaN, a +inf or no finite logit, is NaN, right or wrong.
"""

import torch
from torch import Tensor

from kdfast.reference.kd_kl import accumulate_dtype

# What forward hands to backward, [rows, STATS]:
#   0 max(logits)   1 sum exp(logits - max)   2 <p, a>   3 is the row wrong: 1, 0 or NaN
# A row that is right may hold anything in 1 and 2: its gradient is zero without them.
STATS = 4


def incorrect_brier(
    logits: Tensor,  # [rows, classes]
    labels: Tensor | None,  # [rows] int64, or
    target: Tensor | None,  # [rows, classes] probabilities
    ignore_index: int,
) -> Tensor:  # [rows]
    """The loss of every row, in fp32 (fp64 for fp64 logits)."""
    _, a, wrong = _rows(logits, labels, target, ignore_index)
    return (wrong * a.square().sum(-1, keepdim=True)).squeeze(-1)


def incorrect_brier_stats(*args) -> Tensor:  # [rows, STATS]
    logits, labels, _, ignore_index = args
    p, a, wrong = _rows(*args)
    z = _counted(logits, labels, ignore_index)
    largest = z.amax(-1, keepdim=True)
    spoilt = 0 * a.square().sum(-1, keepdim=True)  # NaN in a row that is NaN
    return torch.cat([largest, (z - largest).exp().sum(-1, keepdim=True), _dot(p, a), wrong + spoilt], -1)


def incorrect_brier_gradient(*args) -> Tensor:  # [rows, classes]
    """d loss / d logits = 2 J(p) a,  J(p) x = p (x - <p, x>) being the Jacobian of softmax times x."""
    p, a, wrong = _rows(*args)
    return 2 * wrong * p * (a - _dot(p, a))


def incorrect_brier_hvp(*args, direction: Tensor) -> Tensor:  # [rows, classes]
    """Hessian of the row's loss times `direction`. A dot is the derivative along it, p. = a. = J(p) w:

    (2 J(p) a). = 2 [ p. (a - <p, a>) + p (p. - <p., a> - <p, p.>) ]
    """
    p, a, wrong = _rows(*args)
    p_dot = p * (direction - _dot(p, direction))
    return 2 * wrong * (p_dot * (a - _dot(p, a)) + p * (p_dot - _dot(p_dot, a) - _dot(p, p_dot)))


def _dot(x: Tensor, y: Tensor) -> Tensor:  # [rows, 1]
    return (x * y).sum(-1, keepdim=True)


def _counted(logits: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    """The logits in the type of the arithmetic, 0 in rows that are ignored."""
    z = logits.to(accumulate_dtype(logits.dtype))
    return z if labels is None else z.masked_fill((labels == ignore_index).unsqueeze(-1), 0)


def _rows(logits, labels, target, ignore_index):
    """p and a, [rows, classes], and which rows are wrong: 1, 0, or NaN for a label out of range, [rows, 1]."""
    z = _counted(logits, labels, ignore_index)
    p = z.softmax(-1)
    prediction = z.argmax(-1)
    if labels is None:
        wrong = (prediction != target.argmax(-1)).to(z.dtype)
        return p, p - target.to(z.dtype), wrong.unsqueeze(-1)
    outside = (labels < 0) | (labels >= z.shape[-1])
    one_hot = torch.zeros_like(z).scatter(-1, labels.masked_fill(outside, 0).unsqueeze(-1), 1.0)
    ignored = labels == ignore_index
    wrong = (prediction != labels).to(z.dtype).masked_fill(outside, torch.nan).masked_fill(ignored, 0)
    return p, p - one_hot, wrong.unsqueeze(-1)
