"""The divergences of kd_kl: each with its value, its gradient and its second derivatives, in plain PyTorch.

    KL     sum p (log p - log q)   forward_kl;   sum q (log q - log p)   reverse_kl;   - sum p log q   soft_ce
    JSD    beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q
    DKD    target_weight T + beta N
           T = KL((p_t, 1 - p_t) || (q_t, 1 - q_t))    the labelled class t against all others together
           N = KL(p^ || q^)                            p^, q^ = softmax over the classes other than t

q = softmax(u) is the student's, p = softmax(v) the teacher's. With a = dD/du, b = dD/dv, and a dot for the derivative
along a direction (u., v.):

    gradient() -> a, b, D          second(u., v.) -> a., b., D.

Everything is [rows, classes] or [rows, 1]. Sources: JSD: Agarwal et al. 2023 (arXiv:2306.13649), eq. 1;
DKD: Zhao et al. 2022 (arXiv:2203.08679), eq. 7.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def softmax_jacobian(p: Tensor, x: Tensor) -> Tensor:
    """The Jacobian of softmax at probabilities p, times x."""
    return p * (x - (p * x).sum(-1, keepdim=True))


class KL:
    """sum from (k log from - log to): `from`, the distribution that weighs, is p, or q for `reverse`.

    With r = k log from - log to, the gradient is `to - from` in to's logits and `from (r - D)` in from's.
    """

    def __init__(self, log_q: Tensor, log_p: Tensor, reverse: bool = False, entropy: bool = True):
        self.reverse, self.entropy = reverse, entropy
        log_from, log_to = (log_q, log_p) if reverse else (log_p, log_q)
        self.p, self.q = log_from.exp(), log_to.exp()
        log_from, log_to = (z.masked_fill(self.p == 0, 0) for z in (log_from, log_to))  # 0 log 0 = 0
        self.r = log_from - log_to if entropy else -log_to

    def value(self) -> Tensor:
        return (self.p * self.r).sum(-1, keepdim=True)

    def gradient(self) -> tuple[Tensor, Tensor, Tensor]:
        d = self.value()
        by_to, by_from = self.q - self.p, self.p * (self.r - d)
        return (by_from, by_to, d) if self.reverse else (by_to, by_from, d)

    def second(self, u_dot: Tensor, v_dot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        to_dot, from_dot = (v_dot, u_dot) if self.reverse else (u_dot, v_dot)
        p, q, r, d = self.p, self.q, self.r, self.value()
        p_dot = softmax_jacobian(p, from_dot)
        log_q_dot = to_dot - (q * to_dot).sum(-1, keepdim=True)
        log_p_dot = from_dot - (p * from_dot).sum(-1, keepdim=True)
        r_dot = log_p_dot - log_q_dot if self.entropy else -log_q_dot
        d_dot = (p_dot * r + p * r_dot).sum(-1, keepdim=True)
        by_to = softmax_jacobian(q, to_dot) - p_dot
        by_from = p_dot * (r - d) + p * (r_dot - d_dot)
        return (by_from, by_to, d_dot) if self.reverse else (by_to, by_from, d_dot)


class JSD:
    """With f = (1 - beta) log(q / m), h = beta log(p / m):  a = q (f - <q, f>),  b = p (h - <p, h>),  D = <q, f> + <p, h>.

    The logarithms are made of x = log p - log q alone, log(p / m) = - log(beta + (1 - beta) e^-x): where the two agree
    x is small and keeps the digits that two logarithms of small probabilities would lose.
    """

    def __init__(self, log_q: Tensor, log_p: Tensor, beta: float):
        self.beta, self.p, self.q = beta, log_p.exp(), log_q.exp()
        p_is_0, q_is_0 = self.p == 0, self.q == 0
        x = (log_p - log_q).masked_fill(p_is_0 | q_is_0, 0)
        of_p, of_q = math.log(beta), math.log1p(-beta)
        log_beta, log_rest = (torch.full((), z, dtype=x.dtype, device=x.device) for z in (of_p, of_q))
        h = -beta * torch.logaddexp(log_beta, log_rest - x)
        f = (beta - 1) * torch.logaddexp(log_rest, log_beta + x)
        # Where one is 0 the mixture is a multiple of the other; 0 log 0 = 0.
        self.h = h.masked_fill(q_is_0, -beta * of_p).masked_fill(p_is_0, 0)
        self.f = f.masked_fill(p_is_0, (beta - 1) * of_q).masked_fill(q_is_0, 0)
        self.share = torch.sigmoid(x + (of_p - of_q)).masked_fill(q_is_0, 1).masked_fill(p_is_0, 0)  # beta p / m

    def _means(self) -> tuple[Tensor, Tensor]:
        return (self.q * self.f).sum(-1, keepdim=True), (self.p * self.h).sum(-1, keepdim=True)

    def value(self) -> Tensor:
        # Element by element: p h + q f = m KL((beta p/m, (1-beta) q/m) || (beta, 1-beta)), and so never negative.
        return (self.q * self.f + self.p * self.h).sum(-1, keepdim=True)

    def gradient(self) -> tuple[Tensor, Tensor, Tensor]:
        mean_f, mean_h = self._means()
        return self.q * (self.f - mean_f), self.p * (self.h - mean_h), self.value()

    def second(self, u_dot: Tensor, v_dot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, q, f, h, (mean_f, mean_h) = self.p, self.q, self.f, self.h, self._means()
        p_dot, q_dot = softmax_jacobian(p, v_dot), softmax_jacobian(q, u_dot)
        x_dot = v_dot - (p * v_dot).sum(-1, keepdim=True) - u_dot + (q * u_dot).sum(-1, keepdim=True)
        f_dot = (self.beta - 1) * self.share * x_dot
        h_dot = self.beta * (1 - self.share) * x_dot
        mean_f_dot = (q_dot * f + q * f_dot).sum(-1, keepdim=True)
        mean_h_dot = (p_dot * h + p * h_dot).sum(-1, keepdim=True)
        by_u = q_dot * (f - mean_f) + q * (f_dot - mean_f_dot)
        by_v = p_dot * (h - mean_h) + p * (h_dot - mean_h_dot)
        return by_u, by_v, mean_f_dot + mean_h_dot


class DKD:
    """Two KLs: of the pair (t, the others together), whose logits are (odds, 0), odds = u_t - log sum_{j != t} e^u_j,
    and of the others among themselves. As d odds / du = e_t - q^ (e_t: one at the label),

        a = target_weight dT/d odds (e_t - q^) + beta dN/du

    1 - p_t is summed over the others and never subtracted from one. Where the teacher has no other class, N = 0.
    """

    def __init__(self, u: Tensor, v: Tensor, at_label: Tensor, beta: float, target_weight: float):
        self.beta, self.target_weight, self.at_label = beta, target_weight, at_label.to(u.dtype)
        odds_u, log_q, _ = _split(u, at_label)
        odds_v, log_p, alone = _split(v, at_label)
        self.others = ~alone
        self.target = KL(*(torch.cat([logsigmoid(z), logsigmoid(-z)], -1) for z in (odds_u, odds_v)))
        self.rest = KL(log_q, log_p)

    def value(self) -> Tensor:
        return self.target_weight * self.target.value() + self.beta * self.rest.value()

    def gradient(self) -> tuple[Tensor, Tensor, Tensor]:
        by_odds_u, by_odds_v, target = self._target(self.target.gradient())
        by_u, by_v, rest = self.rest.gradient()
        a = self.target_weight * by_odds_u * (self.at_label - self.rest.q) + self.beta * self.others * by_u
        b = self.target_weight * by_odds_v * (self.at_label - self.rest.p) + self.beta * by_v
        return a, b, self.target_weight * target + self.beta * rest

    def second(self, u_dot: Tensor, v_dot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, q, one = self.rest.p, self.rest.q, self.at_label
        odds_u_dot, odds_v_dot = (((one - x) * z).sum(-1, keepdim=True) for x, z in ((q, u_dot), (p, v_dot)))
        nothing = torch.zeros_like(odds_u_dot)
        by_odds_u, by_odds_v, _ = self._target(self.target.gradient())
        pairs = (torch.cat([z, nothing], -1) for z in (odds_u_dot, odds_v_dot))
        by_odds_u_dot, by_odds_v_dot, target_dot = self._target(self.target.second(*pairs))
        by_u, by_v, rest_dot = self.rest.second(u_dot, v_dot)
        a = by_odds_u_dot * (one - q) - by_odds_u * softmax_jacobian(q, u_dot)
        b = by_odds_v_dot * (one - p) - by_odds_v * softmax_jacobian(p, v_dot)
        return (
            self.target_weight * a + self.beta * self.others * by_u,
            self.target_weight * b + self.beta * by_v,
            self.target_weight * target_dot + self.beta * rest_dot,
        )

    def _target(self, derivatives: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """d/d odds: of the pair's two entries, which sum to zero, the one made of the smaller probabilities."""
        likely = self.target.p[:, :1] > 0.5
        return *(torch.where(likely, -x[:, 1:], x[:, :1]) for x in derivatives[:2]), derivatives[2]


def _split(z: Tensor, at_label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(odds of the label [rows, 1], log softmax over the others [rows, classes], is there no other [rows, 1])."""
    label = z.masked_fill(~at_label, 0).sum(-1, keepdim=True)
    others = z.masked_fill(at_label, -torch.inf)
    alone = (others == -torch.inf).all(-1, keepdim=True)
    total = others.masked_fill(alone, 0).logsumexp(-1, keepdim=True).masked_fill(alone, -torch.inf)
    return label - total, (others - total).masked_fill(others == -torch.inf, -torch.inf), alone
