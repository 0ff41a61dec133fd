"""MKD: temperatures of student and teacher, learned on validation data."""

import math

import torch
from torch import Tensor, nn

from kdfast.losses.incorrect_brier import incorrect_brier
from kdfast.losses.kd_kl import kd_loss
from kdfast.methods.base import Distiller

LEARNED = ("both", "student", "teacher", "shared")
META_OBJECTIVES = ("ce", "incorrect_brier")
EMBEDDING, HIDDEN = 8, 16  # the paper's sizes


class Temperatures(nn.Module):
    """(tau_s, tau_t) = initial + span * (sigmoid(MLP(e)) - 1/2), with e a learned vector.

    The last layer starts at zero, so that the temperatures start at `initial`.

    Args:
        initial: where they start, and the middle of their range.
        span: width of the range, less than 2 * initial. The paper's equation has 1.
        learn: which of the two move; with "shared" they move as one.
        mlp: whether a small network of a learned vector stands behind them, as in the paper, or one learned number
            each.
    """

    def __init__(self, initial: float = 3.0, span: float = 1.0, learn: str = "both", mlp: bool = True):
        super().__init__()
        if learn not in LEARNED:
            raise ValueError(f"learn must be one of {', '.join(map(repr, LEARNED))}, got {learn!r}.")
        if not 0 < span < 2 * initial < math.inf:
            raise ValueError(
                f"span must be in (0, 2 * initial), so that temperatures stay positive, got span {span} and "
                f"initial {initial}."
            )
        self.initial, self.span, self.learn = initial, span, learn
        count = 2 if learn == "both" else 1
        self.mlp = None
        if mlp:
            self.mlp = nn.Sequential(nn.Linear(EMBEDDING, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, count))
            self.code = nn.Parameter(torch.randn(EMBEDDING))
            nn.init.zeros_(self.mlp[-1].weight)
            nn.init.zeros_(self.mlp[-1].bias)
        else:
            self.code = nn.Parameter(torch.zeros(count))

    def forward(self) -> tuple[Tensor, Tensor]:
        """tau_s and tau_t, scalars."""
        with torch.autocast(self.code.device.type, enabled=False):  # two numbers: rounding them saves nothing
            code = self.code if self.mlp is None else self.mlp(self.code)
            learned = self.initial + self.span * (torch.sigmoid(code) - 0.5)  # [1] or [2]
        fixed = torch.full_like(learned[0], self.initial)
        return {
            "both": (learned[0], learned[-1]),
            "shared": (learned[0], learned[0]),
            "student": (learned[0], fixed),
            "teacher": (fixed, learned[0]),
        }[self.learn]


class MKD(Distiller):
    """Meta knowledge distillation: soft cross-entropy whose two temperatures lower the validation loss.

    Train loss: cross-entropy between softmax(teacher / tau_t) and softmax(student / tau_s), with no tau^2 and no
    labels. Only the temperatures see the labels, of the validation batch.

    Args:
        student: returns logits [batch, classes].
        teacher: the same.
        initial_temperature: of both. The paper tries 1 to 4 and names no default; this one is ours.
        span: the temperatures stay within initial_temperature +- span / 2. The paper's equation has 1, its figures
            suggest more.
        learn: "both" (best in the paper), "student", "teacher" (the other stays fixed) or "shared".
        mlp: the paper's generator, or plain learned numbers.
        meta_objective: "ce", or "incorrect_brier", the paper's equation 8.
        alpha: share of the labels' cross-entropy in the train loss, in [0, 1]; the paper has none.

    Source: Liu et al., "Meta Knowledge Distillation", 2022 (arXiv:2202.07940).

    Example:
        >>> distiller = MKD(student, teacher)
        >>> meta_optimizer = torch.optim.AdamW(distiller.meta_parameters(), lr=3e-4)
        >>> meta_kd_step(distiller, (x, y), (x_val, y_val), optimizer, meta_optimizer)
        >>> tau_s, tau_t = distiller.temperatures()
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        initial_temperature: float = 3.0,
        span: float = 1.0,
        learn: str = "both",
        mlp: bool = True,
        meta_objective: str = "ce",
        alpha: float = 0.0,
    ):
        super().__init__(student, teacher)
        if meta_objective not in META_OBJECTIVES:
            allowed = ", ".join(map(repr, META_OBJECTIVES))
            raise ValueError(f"meta_objective must be one of {allowed}, got {meta_objective!r}.")
        self.temperatures = Temperatures(initial_temperature, span, learn, mlp)
        self.meta_objective, self.alpha = meta_objective, alpha

    def losses(
        self,
        outputs: Tensor,  # [batch, classes]
        teacher_outputs: Tensor,  # [batch, classes]
        targets: Tensor,  # [batch] class indices, or [batch, classes] probabilities
    ) -> dict[str, Tensor]:
        tau_s, tau_t = self.temperatures()
        loss = kd_loss(
            self.logits(outputs),
            teacher_outputs,
            targets if self.alpha > 0 else None,
            alpha=self.alpha,
            student_temperature=tau_s,
            teacher_temperature=tau_t,
            divergence="soft_ce",
            scale="none",
        )
        return {"kd": loss}

    def validation_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.meta_objective == "incorrect_brier":
            return incorrect_brier(self.logits(outputs), targets)
        return super().validation_loss(outputs, targets)

    def meta_parameters(self):
        return self.temperatures.parameters()
