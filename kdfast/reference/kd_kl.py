"""kd_kl: the definition, and its first and second derivatives in closed form.

    loss = weight * [ alpha * CE(student, labels) + (1 - alpha) * scale * D ]

    u = student / tau_s,  q = softmax(u)          v = teacher / tau_t,  p = softmax(v)
    D = sum p (log p - log q)   forward_kl
      = sum q (log q - log p)   reverse_kl
      = - sum p log q           soft_ce
      = the generalised Jensen-Shannon divergence (jsd) or decoupled distillation (dkd): kd_kl_divergences.py
    scale = tau_s^2 | tau_s tau_t | 1

`student` and `teacher` stand for the logits x after x' = softcap tanh(logit_scale x / softcap), or logit_scale x
without a softcap; the hard labels' cross-entropy sees the student's x' too.

Plain PyTorch, one row at a time in meaning, no speed tricks: this is what runs where nothing is
compiled, and what every compiled version is tested against. `kd_kl` is the definition;
`kd_kl_gradient` and `kd_kl_hvp` state its derivatives (docs/math/kd_kl.md derives them).

Masked classes: a logit of -inf has probability zero, and a class of probability zero adds zero to
a sum over that probability (0 log 0 = 0). Label smoothing spreads over the student's finite classes.
A row whose label is ignore_index counts for nothing; one whose label is out of range is NaN. A masked logit stays
masked under a softcap.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.reference.kd_kl_divergences import DKD as DecoupledKD
from kdfast.reference.kd_kl_divergences import JSD as JensenShannon
from kdfast.reference.kd_kl_divergences import KL, softmax_jacobian

FORWARD_KL, REVERSE_KL, SOFT_CE, JSD, DKD = 0, 1, 2, 3, 4
SCALE_TAU2, SCALE_PRODUCT, SCALE_NONE = 0, 1, 2

# The row statistics kernels hand from forward to backward, [rows, STATS]. Maxima and log-sums apart, as
# (student - max) / tau - log_z keeps its digits for logits far from zero where lse would not:
#   0 max(student)  1 max(teacher)  2 log sum exp(u - max u)  3 log sum exp(v - max v)
#   4 log sum exp(student - max student)  5 D  6 d loss / d tau_s  7 d loss / d tau_t  (6, 7 only when asked)
# For jsd and dkd the columns 0 to 5 of a compiled kernel are what its own backward needs.
STATS = 8


class Options(NamedTuple):
    """The constants of one call, in the order of the op's schema."""

    tau_s: float = 1.0  # used where the student_temperature tensor is None
    tau_t: float = 1.0  # used where the teacher_temperature tensor is None
    alpha: float = 0.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    divergence: int = FORWARD_KL
    scale: int = SCALE_TAU2
    beta: float = 0.5  # jsd: the teacher's share of the mixture; dkd: factor on the other classes' part
    target_weight: float = 1.0  # dkd: factor on the labelled class's part
    softcap: float = 0.0  # logits become softcap * tanh(logits / softcap); 0: they stay
    logit_scale: float = 1.0  # and before that, logit_scale * logits


DEFAULTS = Options()


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; every narrower storage type is summed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kd_kl(
    student: Tensor,  # [rows, classes]
    teacher: Tensor,  # [rows, classes]
    student_temperature: Tensor | None = None,  # [1] or [rows]
    teacher_temperature: Tensor | None = None,  # [1] or [rows]
    labels: Tensor | None = None,  # [rows] int64
    target: Tensor | None = None,  # [rows, classes] probabilities
    weight: Tensor | None = None,  # [rows]
    options: Options = DEFAULTS,
) -> Tensor:  # [rows]
    """The distillation loss of every row, in fp32 (fp64 for fp64 logits)."""
    x = _Rows(student, teacher, student_temperature, teacher_temperature, labels, weight, options)
    loss = x.c * x.divergence.value() if options.alpha < 1 else torch.zeros_like(x.lse_u)
    if options.alpha > 0:
        loss = (1 - options.alpha) * loss + options.alpha * x.cross_entropy(labels, target)
    return (loss if x.coefficient is None else x.coefficient * loss).squeeze(-1)


def kd_kl_gradient(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d loss / d (student, teacher, tau_s, tau_t): [rows, classes] twice, then [rows] twice.

    With a = dD/du and b = dD/dv (for forward_kl q - p and p (log p - log q - D)):

        d/dstudent = c a / tau_s        d/dtau_s = -c <a, u> / tau_s + D dc/dtau_s

    and d/dx = x'(x) d/dx' for the raw logits.
    """
    student, teacher, student_temperature, teacher_temperature, labels, target, weight, options = args
    x = _Rows(student, teacher, student_temperature, teacher_temperature, labels, weight, options)
    a, b, d = x.divergence.gradient()
    c_s, c_t = x.scale_gradient()
    keep = 1 - options.alpha
    ds, dt = x.logit_gradients(a, b, labels, target)
    dtau_s = keep * (c_s * d - x.c * (a * x.u_finite).sum(-1, keepdim=True) / x.tau_s)
    dtau_t = keep * (c_t * d - x.c * (b * x.v_finite).sum(-1, keepdim=True) / x.tau_t)
    ds, dt = x.slope_s * ds, x.slope_t * dt
    if x.coefficient is not None:
        ds, dt, dtau_s, dtau_t = (x.coefficient * g for g in (ds, dt, dtau_s, dtau_t))
    return ds, dt, dtau_s.squeeze(-1), dtau_t.squeeze(-1)


def kd_kl_stats(*args) -> Tensor:  # [rows, STATS]
    """The row statistics; the last argument says whether those for the temperatures are asked for."""
    *arguments, temperature_grad = args
    student, teacher, student_temperature, teacher_temperature, labels, _, weight, options = arguments
    x = _Rows(student, teacher, student_temperature, teacher_temperature, labels, weight, options)
    columns = [cap(z.to(x.dtype), options).amax(-1, keepdim=True) for z in (student, teacher)]
    columns += [(z - z.amax(-1, keepdim=True)).logsumexp(-1, keepdim=True) for z in (x.u, x.v, x.s)]
    columns.append(x.divergence.value())
    gradients = kd_kl_gradient(*arguments)[2:] if temperature_grad else [torch.zeros_like(x.s[:, 0])] * 2
    return torch.cat([*columns, *(g.unsqueeze(-1) for g in gradients)], -1)


def kd_kl_hvp(*args, direction: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hessian of the row's loss in (student, teacher, tau_s, tau_t) times `direction`, same shapes.

    A dot is the derivative along `direction`; the divergence gives a. and b. for

        u. = (x'. - u w_tau_s) / tau_s,    x'. = slope w_s        and the same of v
    """
    student, teacher, student_temperature, teacher_temperature, labels, target, weight, options = args
    x = _Rows(student, teacher, student_temperature, teacher_temperature, labels, weight, options)
    w_s, w_t, w_tau_s, w_tau_t = (
        torch.zeros((), dtype=x.dtype, device=student.device)
        if w is None
        else w.to(x.dtype).reshape(w.shape if w.dim() == 2 else (-1, 1))
        for w in direction
    )
    s_dot, t_dot = x.slope_s * w_s, x.slope_t * w_t
    u_dot = (s_dot - x.u_finite * w_tau_s) / x.tau_s
    v_dot = (t_dot - x.v_finite * w_tau_t) / x.tau_t
    a, b, d = x.divergence.gradient()
    a_dot, b_dot, d_dot = x.divergence.second(u_dot, v_dot)
    c, (c_s, c_t), (c_ss, c_st, c_tt) = x.c, x.scale_gradient(), x.scale_hessian()
    c_dot = c_s * w_tau_s + c_t * w_tau_t

    def logits(g, g_dot, tau, w_tau):
        return (c_dot * g + c * g_dot - c * g * w_tau / tau) / tau

    def temperature(g, g_dot, z, z_dot, tau, w_tau, c_own, c_own_dot):
        inner = (g * z).sum(-1, keepdim=True)
        inner_dot = (g_dot * z + g * z_dot).sum(-1, keepdim=True)
        return c_own_dot * d + c_own * d_dot - (c_dot * inner + c * inner_dot - c * inner * w_tau / tau) / tau

    keep = 1 - options.alpha
    hs = keep * logits(a, a_dot, x.tau_s, w_tau_s)
    ht = keep * logits(b, b_dot, x.tau_t, w_tau_t)
    c_s_dot, c_t_dot = c_ss * w_tau_s + c_st * w_tau_t, c_st * w_tau_s + c_tt * w_tau_t
    htau_s = keep * temperature(a, a_dot, x.u_finite, u_dot, x.tau_s, w_tau_s, c_s, c_s_dot)
    htau_t = keep * temperature(b, b_dot, x.v_finite, v_dot, x.tau_t, w_tau_t, c_t, c_t_dot)
    if options.alpha > 0:
        mass, _ = x.hard_target(labels, target)
        hs = hs + options.alpha * mass * softmax_jacobian(x.log_prob.exp(), s_dot)
    if options.softcap > 0:  # x' bends: its slope has a derivative of its own
        ds, dt = x.logit_gradients(a, b, labels, target)
        hs, ht = hs + x.bend_s * w_s * ds, ht + x.bend_t * w_t * dt
    hs, ht = x.slope_s * hs, x.slope_t * ht
    if x.coefficient is not None:
        hs, ht, htau_s, htau_t = (x.coefficient * h for h in (hs, ht, htau_s, htau_t))
    rows = student.shape[0]
    return hs, ht, htau_s.expand(rows, 1).squeeze(-1), htau_t.expand(rows, 1).squeeze(-1)


def cap(x: Tensor, options: Options) -> Tensor:
    """x' = softcap tanh(logit_scale x / softcap), or logit_scale x; -inf stays."""
    if options.softcap > 0:
        capped = options.softcap * torch.tanh(x * (options.logit_scale / options.softcap))
        return capped.masked_fill(x == -torch.inf, -torch.inf)
    return x if options.logit_scale == 1 else options.logit_scale * x


def _slope(capped: Tensor, options: Options) -> tuple[Tensor | float, Tensor | float]:
    """dx'/dx, and the derivative of its logarithm in x; 0 and 0 for masked classes under a softcap."""
    if options.softcap > 0:
        y = capped.masked_fill(capped == -torch.inf, -options.softcap) / options.softcap
        return options.logit_scale * (1 - y * y), -2 * options.logit_scale / options.softcap * y
    return options.logit_scale, 0.0


class _Rows:
    """What the definition and its derivatives share; all of it [rows, classes] or [rows, 1]."""

    def __init__(self, student, teacher, student_temperature, teacher_temperature, labels, weight, options):
        self.dtype = accumulate_dtype(student.dtype)
        self.options = options
        if options.alpha >= 1:  # nothing hangs on the teacher then, and 0 times what it holds need not be 0
            teacher = student.detach()
        s, t = student.to(self.dtype), teacher.to(self.dtype)
        self.coefficient = None if weight is None else weight.to(self.dtype).unsqueeze(-1)
        if labels is not None:  # an ignored row counts for nothing, whatever its logits hold
            counted = (labels != options.ignore_index).unsqueeze(-1)
            s, t = s.masked_fill(~counted, 0), t.masked_fill(~counted, 0)
            one = torch.ones_like(counted, dtype=self.dtype) if weight is None else self.coefficient
            outside = counted & ((labels < 0) | (labels >= s.shape[-1])).unsqueeze(-1)
            self.coefficient = one.masked_fill(~counted, 0).masked_fill(outside, torch.nan)
        s, t = cap(s, options), cap(t, options)
        (self.slope_s, self.bend_s), (self.slope_t, self.bend_t) = _slope(s, options), _slope(t, options)
        # Softmax does not see a shift; temperature gradients far from zero would lose their digits to it.
        s, t = (z - z.amax(-1, keepdim=True).detach() for z in (s, t))
        self.tau_s = options.tau_s if student_temperature is None else student_temperature.unsqueeze(-1)
        self.tau_t = options.tau_t if teacher_temperature is None else teacher_temperature.unsqueeze(-1)
        self.masked_s, self.masked_t = s == -torch.inf, t == -torch.inf
        self.s = s
        self.u_finite = s.masked_fill(self.masked_s, 0) / self.tau_s
        self.v_finite = t.masked_fill(self.masked_t, 0) / self.tau_t
        self.u = self.u_finite.masked_fill(self.masked_s, -torch.inf)
        self.v = self.v_finite.masked_fill(self.masked_t, -torch.inf)
        self.lse_u, self.lse_v = (z.logsumexp(-1, keepdim=True) for z in (self.u, self.v))
        self.divergence = self._divergence(labels)
        self.c = {0: self.tau_s**2, 1: self.tau_s * self.tau_t, 2: 1.0}[options.scale]

    def _divergence(self, labels) -> KL | JensenShannon | DecoupledKD:
        o = self.options
        if o.divergence == DKD:
            at_label = torch.zeros_like(self.s, dtype=torch.bool).scatter(-1, self._safe(labels), True)
            return DecoupledKD(self.u, self.v, at_label, o.beta, o.target_weight)
        log_q, log_p = self.u - self.lse_u, self.v - self.lse_v
        if o.divergence == JSD:
            return JensenShannon(log_q, log_p, o.beta)
        return KL(log_q, log_p, o.divergence == REVERSE_KL, o.divergence != SOFT_CE)

    def _safe(self, labels: Tensor) -> Tensor:  # [rows, 1]
        """Labels that can be looked up; rows where this changes something do not count or are NaN."""
        return labels.masked_fill((labels < 0) | (labels >= self.s.shape[-1]), 0).unsqueeze(-1)

    @property
    def log_prob(self) -> Tensor:
        """log softmax of the student at temperature one, which the hard labels see."""
        return self.s.log_softmax(-1)

    def logit_gradients(self, a, b, labels, target):
        """d loss / d (student', teacher') without the row's coefficient."""
        keep = 1 - self.options.alpha
        ds, dt = keep * self.c * a / self.tau_s, keep * self.c * b / self.tau_t
        if self.options.alpha > 0:
            mass, weighted = self.hard_target(labels, target)
            ds = ds + self.options.alpha * (mass * self.log_prob.exp() - weighted)
        return ds, dt

    def scale_gradient(self):
        return {0: (2 * self.tau_s, 0.0), 1: (self.tau_t, self.tau_s), 2: (0.0, 0.0)}[self.options.scale]

    def scale_hessian(self):
        return {0: (2.0, 0.0, 0.0), 1: (0.0, 1.0, 0.0), 2: (0.0, 0.0, 0.0)}[self.options.scale]

    def hard_target(self, labels, target):
        """(its total mass [rows, 1], the smoothed target [rows, classes])."""
        smoothing = self.options.label_smoothing
        if target is None:
            target = torch.zeros_like(self.s).scatter(-1, self._safe(labels), 1.0)
        target = target.to(self.dtype)
        if smoothing > 0:
            finite = (~self.masked_s).to(self.dtype)
            target = (1 - smoothing) * target + smoothing * finite / finite.sum(-1, keepdim=True)
        return target.sum(-1, keepdim=True), target

    def cross_entropy(self, labels, target) -> Tensor:
        _, target = self.hard_target(labels, target)
        return -(target * self.log_prob.masked_fill(target == 0, 0)).sum(-1, keepdim=True)
