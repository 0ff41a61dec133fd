"""kd_kl in Triton: what its kernels share, row by row and tile by tile. See kd_kl.py for the formulas."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal fp32: a probability below it counts for nothing
REVERSE_KL, SOFT_CE, JSD, DKD = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
SCALED, CAPPED = tl.constexpr(1), tl.constexpr(2)
SCALE_TAU2, SCALE_PRODUCT = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def constant(value, row, ACC: tl.constexpr):
    """A number of the call, a value a row; through fp64, as Triton would pass a Python float on as fp32."""
    return (tl.zeros(row.shape, tl.float64) + value).to(ACC)


@triton.jit
def per_row(pointer, stride, row, exists, otherwise, ACC: tl.constexpr):
    """A value a row from a tensor [rows] (or [1], stride 0), or a constant where there is no tensor."""
    if pointer is not None:
        return tl.load(pointer + row * stride, mask=exists, other=1.0).to(ACC)
    return constant(otherwise, row, ACC)


@triton.jit
def row_labels(labels, labels_stride, weight, weight_stride, row, exists, classes, ignored, ACC: tl.constexpr):
    """(does the row count, its coefficient, its label): NaN for a label out of range, 0 for none."""
    coefficient = per_row(weight, weight_stride, row, exists, 1.0, ACC)
    counts = exists
    label = tl.zeros(row.shape, tl.int64)
    if labels is not None:
        label = tl.load(labels + row * labels_stride, mask=exists, other=0)
        counts = exists & (label != ignored)
        coefficient = tl.where((label >= 0) & (label < classes), coefficient, float("nan"))
    return counts, coefficient, label


@triton.jit
def scale_factor(tau_s, tau_t, SCALE: tl.constexpr):
    """c and its derivatives in tau_s and tau_t."""
    if SCALE == SCALE_TAU2:
        return tau_s * tau_s, 2.0 * tau_s, tau_s * 0.0
    if SCALE == SCALE_PRODUCT:
        return tau_s * tau_t, tau_t, tau_s
    return tau_s * 0.0 + 1.0, tau_s * 0.0, tau_s * 0.0


@triton.jit
def raise_maximum(old, tile_max, k):
    """The maximum raised by a tile's: (new maximum, where to measure from, effect on sums, on distances)."""
    new = tl.maximum(old, tile_max)
    distance = tl.where(new > old, (new - old) * k, 0.0)
    factor = tl.exp2(-distance)
    distance = tl.where(old == -INF, 0.0, distance)
    return new, tl.where(new == -INF, 0.0, new), factor, distance


@triton.jit
def load_tile(pointer, base, column, mask, other, ACC: tl.constexpr):
    return tl.load(pointer + base[:, None] + column[None, :], mask=mask, other=other).to(ACC)


@triton.jit
def tanh(x):
    """fp32: an odd minimax polynomial for small x (relative error 3e-9), where 1 - e would lose digits."""
    a = tl.abs(x)
    e = tl.exp2(a * (-2.0 * LOG2E))
    large = (1.0 - e) / (1.0 + e)
    large = tl.where(x < 0.0, -large, large)
    if x.dtype == tl.float64:
        return large
    z = x * x
    p = (((-5.9058652e-3 * z + 2.0805382e-2) * z - 5.3786683e-2) * z + 1.3331958e-1) * z - 3.3333299e-1
    return tl.where(a < 0.6, x + x * z * p, large)


@triton.jit
def cap(x, softcap, logit_scale, CAP: tl.constexpr):
    """x' = softcap tanh(logit_scale x / softcap), or logit_scale x; a masked class stays masked. For logits of a tile
    or one a row, with softcap and logit_scale of a shape that goes with them."""
    if CAP == CAPPED:
        return tl.where(x == -INF, -INF, softcap * tanh(x * (logit_scale / softcap)))
    if CAP == SCALED:
        return x * logit_scale
    return x


@triton.jit
def logits(pointer, base, column, mask, softcap, logit_scale, ACC: tl.constexpr, CAP: tl.constexpr):
    """A tile of x'; outside the row: masked classes, adding nothing."""
    x = load_tile(pointer, base, column, mask, -INF, ACC)
    return cap(x, softcap[:, None], logit_scale[:, None], CAP)


@triton.jit
def uncap(gradient, capped, softcap, logit_scale, CAP: tl.constexpr):
    """The gradient in x from that in x'."""
    if CAP == CAPPED:
        y = tl.where(capped == -INF, 0.0, capped / softcap[:, None])
        return gradient * (logit_scale[:, None] * (1.0 - y * y))
    if CAP == SCALED:
        return gradient * logit_scale[:, None]
    return gradient


@triton.jit
def from_to(s, t, DIVERGENCE: tl.constexpr):
    """What belongs to (student, teacher), ordered as (from, to); the same call turns it back."""
    if DIVERGENCE == REVERSE_KL:
        return s, t
    return t, s


@triton.jit
def ratio(log2_p, log2_q, DIVERGENCE: tl.constexpr):
    """r = k log p - log q, in units of log 2."""
    if DIVERGENCE == SOFT_CE:
        return -log2_q
    return log2_p - log2_q


@triton.jit
def put(stats, i, value, row, counts, exists):
    """One statistic, [rows, 8]; 0 for a row that does not count, as for what the loss does not need."""
    tl.store(stats + row * 8 + i, tl.where(counts, value, 0.0), mask=exists)


@triton.jit
def mixture(p, q, beta):
    """(h, f) = (beta log(p / m), (1 - beta) log(q / m)), m = beta p + (1 - beta) q; 0 for a probability of 0."""
    rest = 1.0 - beta
    m = beta * p + rest * q
    h = tl.where(p < TINY, 0.0, beta * tl.log2(p / m))
    f = tl.where(q < TINY, 0.0, rest * tl.log2(q / m))
    return h * LN2, f * LN2


@triton.jit
def pair(odds):
    """(log p_t, log(1 - p_t), p_t, 1 - p_t) of log odds, each made without a difference of probabilities."""
    e = tl.exp2(-tl.abs(odds) * LOG2E)
    log_larger = -tl.log2(1.0 + e) * LN2
    larger, smaller = 1.0 / (1.0 + e), e / (1.0 + e)
    likely = odds > 0.0
    log_p = tl.where(likely, log_larger, log_larger + odds)
    log_not_p = tl.where(likely, log_larger - odds, log_larger)
    return log_p, log_not_p, tl.where(likely, larger, smaller), tl.where(likely, smaller, larger)


@triton.jit
def mixture_means(
    student, teacher, base, counts, classes, softcap, logit_scale, from_max, to_max, k_from, k_to,
    log2_z_from, log2_z_to, beta, ACC: tl.constexpr, CAP: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """(<p, h>, <q, f>, D) of jsd: a sweep over the row, p and q given by their statistics."""
    mean_h, mean_f, divergence = from_max * 0.0, from_max * 0.0, from_max * 0.0
    for begin in range(0, classes, COLS):
        column = begin + tl.arange(0, COLS)
        mask = counts[:, None] & (column < classes)[None, :]
        x = logits(teacher, base, column, mask, softcap, logit_scale, ACC, CAP)
        y = logits(student, base, column, mask, softcap, logit_scale, ACC, CAP)
        p = tl.exp2((x - from_max[:, None]) * k_from[:, None] - log2_z_from[:, None])
        q = tl.exp2((y - to_max[:, None]) * k_to[:, None] - log2_z_to[:, None])
        h, f = mixture(p, q, beta[:, None])
        mean_h += tl.sum(p * h, 1)
        mean_f += tl.sum(q * f, 1)
        divergence += tl.sum(p * h + q * f, 1)  # term by term never negative
    return mean_h, mean_f, divergence


@triton.jit
def decouple(
    student, teacher, base, label, at_label, softcap, logit_scale, from_max, to_max, k_from, k_to,
    log2_z_from, log2_z_to, target_weight, ACC: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The label's part of dkd, from its logits and the others' statistics: where these are measured from (0 where there
    is no other), target_weight times T, dT / d odds of teacher and student, and the student's logit at the label."""
    s = cap(tl.load(student + base + label, mask=at_label, other=0.0).to(ACC), softcap, logit_scale, CAP)
    t = cap(tl.load(teacher + base + label, mask=at_label, other=0.0).to(ACC), softcap, logit_scale, CAP)
    from_base, to_base = tl.where(from_max == -INF, 0.0, from_max), tl.where(to_max == -INF, 0.0, to_max)
    odds_u = ((s - to_base) * k_to - log2_z_to) * LN2
    odds_v = ((t - from_base) * k_from - log2_z_from) * LN2
    log_q, log_not_q, q, not_q = pair(odds_u)
    log_p, log_not_p, p, not_p = pair(odds_v)
    target = tl.where(p == 0.0, 0.0, p * (log_p - log_q)) + tl.where(not_p == 0.0, 0.0, not_p * (log_not_p - log_not_q))
    by_odds_u = tl.where(odds_v > 0.0, not_p - not_q, q - p)
    by_odds_v = tl.where(p * not_p == 0.0, 0.0, p * not_p * (odds_v - odds_u))
    return from_base, to_base, target_weight * target, target_weight * by_odds_v, target_weight * by_odds_u, s


@triton.jit
def gradients(
    x, y, at_label, from_base, to_base, k_from, k_to, log2_z_from, log2_z_to, from_mean, to_mean,
    from_odds, to_odds, beta, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """(dD/d from, dD/d to, and both logits over temperature, from their bases, in units of log 2) of a tile of logits.

    from_mean is D for a KL, <p, h> for jsd, N for dkd; to_mean is <q, f> for jsd. For dkd the sums are the others',
    and the odds are target_weight dT / d odds.
    """
    y_from, y_to = (x - from_base[:, None]) * k_from[:, None], (y - to_base[:, None]) * k_to[:, None]
    log2_p, log2_q = y_from - log2_z_from[:, None], y_to - log2_z_to[:, None]
    p, q = tl.exp2(log2_p), tl.exp2(log2_q)
    if DIVERGENCE == JSD:
        h, f = mixture(p, q, beta[:, None])
        return p * (h - from_mean[:, None]), q * (f - to_mean[:, None]), y_from, y_to
    r = ratio(log2_p, log2_q, DIVERGENCE) * LN2 - from_mean[:, None]
    if DIVERGENCE == DKD:
        by_from = tl.where(p == 0.0, 0.0, p * (beta[:, None] * r - from_odds[:, None]))
        by_to = beta[:, None] * (q - p) - to_odds[:, None] * q
        by_from = tl.where(at_label, from_odds[:, None], by_from)
        return by_from, tl.where(at_label, to_odds[:, None], by_to), y_from, y_to
    return tl.where(p == 0.0, 0.0, p * r), q - p, y_from, y_to
