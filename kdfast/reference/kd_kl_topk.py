"""kd_kl_topk: forward KL to a teacher known by its k likeliest classes, and its derivatives in closed form.

    loss = weight * tau_s^2 * D,   u = student / tau_s,  q = softmax(u)
    D = sum_listed p (log p - log q) + p_tail (log p_tail - log q_tail)
    p_tail = 1 - sum_listed p  (0 where no more than the rounding of log p),   q_tail = sum of q over the other classes

The tail is one class of both distributions. 0 log 0 = 0: where p_tail is 0, or every class is listed, there is no tail.
A tail the student masks and the teacher does not makes D infinite. Plain PyTorch; docs/math/kd_kl_topk.md derives it.
A row whose label is ignore_index counts for nothing; one with an index that is no class is NaN.
"""

import torch
from torch import Tensor

from kdfast.reference.kd_kl import accumulate_dtype

# The row statistics kernels hand from forward to backward, [rows, STATS]:
#   0 max(student)  1 log sum exp((student - max) / tau)  2 the tail's max(student)
#   3 g, dD/du = g exp((student - the tail's max) / tau) in the tail  4 d loss / d tau_s (only when asked)
STATS = 5


def kd_kl_topk(
    student: Tensor,  # [rows, classes]
    teacher_log_probs: Tensor,  # [rows, k]
    indices: Tensor,  # [rows, k] int64, distinct in a row
    student_temperature: Tensor | None = None,  # [1] or [rows]
    labels: Tensor | None = None,  # [rows] int64: which rows are ignored
    weight: Tensor | None = None,  # [rows]
    tau_s: float = 1.0,  # used where the student_temperature tensor is None
    ignore_index: int = -100,
) -> Tensor:  # [rows]
    """The distillation loss of every row, in fp32 (fp64 for fp64 logits)."""
    x = _Rows(student, teacher_log_probs, indices, student_temperature, labels, weight, tau_s, ignore_index)
    return (x.coefficient * x.tau**2 * x.divergence()).squeeze(-1)


def kd_kl_topk_gradient(*args) -> tuple[Tensor, Tensor]:
    """d loss / d (student, tau_s): [rows, classes] and [rows].

    a = dD/du = q - P, P the teacher with its tail spread as the student's is: P = p_tail q / q_tail there.
    """
    x = _Rows(*args)
    a, d = x.gradient(), x.divergence()
    by_tau = x.coefficient * x.tau * (2 * d - (a * x.u_finite).sum(-1, keepdim=True))
    return x.coefficient * x.tau * a, by_tau.squeeze(-1)


def kd_kl_topk_stats(*args) -> Tensor:  # [rows, STATS]
    """The row statistics; the last argument says whether that for the temperature is asked for."""
    *arguments, temperature_grad = args
    x = _Rows(*arguments)
    tail = x.s.masked_fill(x.listed, -torch.inf)
    top = arguments[0].to(x.dtype).amax(-1, keepdim=True)
    tail_max = tail.amax(-1, keepdim=True)
    log_z = x.u.logsumexp(-1, keepdim=True)
    log_z_tail = x.log_q_tail + log_z - (tail_max / x.tau).masked_fill(tail_max == -torch.inf, 0)
    g = (tail_max / x.tau - log_z).exp() - (x.p_tail * (-log_z_tail).exp()).masked_fill(x.p_tail == 0, 0)
    by_tau = kd_kl_topk_gradient(*arguments)[1].unsqueeze(-1) if temperature_grad else torch.zeros_like(top)
    return torch.cat([top, log_z, top + tail_max, g, by_tau], -1)


def kd_kl_topk_hvp(*args, direction: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """Hessian of the row's loss in (student, tau_s) times `direction`: [rows, classes] and [rows].

    With t the student's distribution within the tail and J(p) x = p (x - <p, x>): a. = J(q) u. - p_tail J(t) u.
    """
    x = _Rows(*args)
    w, w_tau = (
        torch.zeros((), dtype=x.dtype, device=x.s.device)
        if v is None
        else v.to(x.dtype).reshape(v.shape if v.dim() == 2 else (-1, 1))
        for v in direction
    )
    u_dot = (w - x.u_finite * w_tau) / x.tau
    a, d = x.gradient(), x.divergence()
    a_dot = _j(x.log_q.exp(), u_dot) - x.p_tail * _j(x.tail(), u_dot)
    d_dot = (a * u_dot).sum(-1, keepdim=True)
    inner = (a * x.u_finite).sum(-1, keepdim=True)
    inner_dot = (a_dot * x.u_finite + a * u_dot).sum(-1, keepdim=True)
    h = x.coefficient * (w_tau * a + x.tau * a_dot)
    h_tau = x.coefficient * (w_tau * (2 * d - inner) + x.tau * (2 * d_dot - inner_dot))
    return h, h_tau.expand(x.s.shape[0], 1).squeeze(-1)


def _j(p: Tensor, x: Tensor) -> Tensor:
    """The Jacobian of softmax times x."""
    return p * (x - (p * x).sum(-1, keepdim=True))


class _Rows:
    """What the definition and its derivatives share; [rows, classes], [rows, k] or [rows, 1]."""

    def __init__(self, student, log_probs, indices, student_temperature, labels, weight, tau_s, ignore_index):
        self.dtype = accumulate_dtype(student.dtype)
        classes = student.shape[-1]
        s, log_p = student.to(self.dtype), log_probs.to(self.dtype)
        inside = ((indices >= 0) & (indices < classes)).all(-1, keepdim=True)
        self.coefficient = torch.ones_like(inside, dtype=self.dtype).masked_fill(~inside, torch.nan)
        if weight is not None:
            self.coefficient = self.coefficient * weight.to(self.dtype).unsqueeze(-1)
        if labels is not None:  # an ignored row counts for nothing, whatever its logits hold
            ignored = (labels == ignore_index).unsqueeze(-1)
            self.coefficient = self.coefficient.masked_fill(ignored, 0)
            s = s.masked_fill(ignored, 0)
            log_p = log_p.masked_fill(ignored, -torch.inf)
        s = s - s.amax(-1, keepdim=True).detach()
        self.tau = tau_s if student_temperature is None else student_temperature.unsqueeze(-1)
        masked = s == -torch.inf
        self.s = s
        self.u_finite = s.masked_fill(masked, 0) / self.tau
        self.u = self.u_finite.masked_fill(masked, -torch.inf)
        self.log_q = self.u - self.u.logsumexp(-1, keepdim=True)
        self.indices = indices.clamp(0, classes - 1)
        self.listed = torch.zeros_like(s, dtype=torch.bool).scatter(-1, self.indices, True)
        self.log_p, self.p = log_p, log_p.exp()
        if indices.shape[-1] == classes:  # no tail
            self.p_tail, self.log_q_tail = torch.zeros_like(s[:, :1]), torch.full_like(s[:, :1], -torch.inf)
        else:  # 1 - p of the likeliest, exactly; then less the rest
            likeliest = log_p.argmax(-1, keepdim=True)
            rest = self.p.scatter(-1, likeliest, 0.0).sum(-1, keepdim=True)
            left = -torch.expm1(log_p.gather(-1, likeliest)) - rest
            doubt = torch.finfo(self.dtype).eps * -(self.p * log_p.masked_fill(self.p == 0, 0)).sum(-1, keepdim=True)
            self.p_tail = left.masked_fill(left <= doubt, 0)  # the rounding of log p moves p by up to p |log p| eps
            self.log_q_tail = self.log_q.masked_fill(self.listed, -torch.inf).logsumexp(-1, keepdim=True)

    def divergence(self) -> Tensor:
        log_p, log_q = (z.masked_fill(self.p == 0, 0) for z in (self.log_p, self.log_q.gather(-1, self.indices)))
        no_tail = self.p_tail == 0
        log_tail = self.p_tail.masked_fill(no_tail, 1).log() - self.log_q_tail.masked_fill(no_tail, 0)
        return (self.p * (log_p - log_q)).sum(-1, keepdim=True) + self.p_tail * log_tail

    def tail(self) -> Tensor:
        """t: the student's distribution within the tail, 0 at the listed classes."""
        no_tail = (self.log_q_tail == -torch.inf) & (self.p_tail == 0)
        return (self.log_q - self.log_q_tail.masked_fill(no_tail, 0)).exp().masked_fill(self.listed | no_tail, 0)

    def gradient(self) -> Tensor:
        listed = torch.zeros_like(self.s).scatter(-1, self.indices, self.p)
        return self.log_q.exp() - listed - self.p_tail * self.tail()
