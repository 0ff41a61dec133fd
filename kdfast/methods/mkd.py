"""MKD: temperatures of student and teacher, learned on validation data."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kdfast.losses import _checks as check
from kdfast.losses.incorrect_brier import incorrect_brier
from kdfast.losses.kd_kl import kd_loss
from kdfast.methods.base import Distiller, Loss

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
        student: returns logits [batch, classes]; or with `distillation_token` a pair of them; or with `features`,
            called with ``features=True``, logits and a list of features.
        teacher: the same, without a token.
        initial_temperature: of both. The paper tries 1 to 4 and names no default; this one is ours.
        span: the temperatures stay within initial_temperature +- span / 2. The paper's equation has 1, its figures
            suggest more.
        learn: "both" (best in the paper), "student", "teacher" (the other stays fixed) or "shared".
        mlp: the paper's generator, or plain learned numbers.
        meta_objective: "ce": the validation loss, which is cross-entropy unless given; or "incorrect_brier", the
            paper's equation 8.
        alpha: share of the task loss in the train loss, in [0, 1]. Unless given 0, as in the paper; with a
            distillation token 0.5, DeiT's share of the class token.
        distillation_token: whether the student, in training, returns (class logits, distillation logits): the teacher
            supervises the second, the task loss the first, and `logits` is their mean.
        features: whether the networks are called with ``features=True``, for `extra_losses`.
        extra_losses: of (outputs, teacher_outputs, targets), to named parts that are added to the train loss, such as
            `ContrastiveHead` for the paper's CRD + MKD. A module's parameters are trained with the student. Targets may
            then be a tuple whose first item is the task's.
        meta_last_epochs: in how many epochs at the end the temperatures learn; ``None``: in all. The paper: 100 of 300
            for vision transformers. A trainer takes ordinary steps while `meta_active` is False.
        task_loss, validation_loss: see `Distiller`.

    Attributes:
        meta_active: whether the temperatures learn in this epoch; `start_epoch` sets it.

    Source: Liu et al., "Meta Knowledge Distillation", 2022 (arXiv:2202.07940); the token: Touvron et al., "Training
    data-efficient image transformers & distillation through attention", ICML 2021 (arXiv:2012.12877).

    Example:
        >>> distiller = MKD(student, teacher)
        >>> optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.05, momentum=0.9)
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
        alpha: float | None = None,
        distillation_token: bool = False,
        features: bool = False,
        extra_losses: Callable[[Any, Any, Any], dict[str, Tensor]] | None = None,
        meta_last_epochs: int | None = None,
        task_loss: Loss = cross_entropy,
        validation_loss: Loss | None = None,
    ):
        super().__init__(student, teacher, task_loss=task_loss, validation_loss=validation_loss)
        if meta_objective not in META_OBJECTIVES:
            allowed = ", ".join(map(repr, META_OBJECTIVES))
            raise ValueError(f"meta_objective must be one of {allowed}, got {meta_objective!r}.")
        if meta_last_epochs is not None and meta_last_epochs < 1:
            raise ValueError(f"meta_last_epochs must be at least 1, or None for all epochs, got {meta_last_epochs}.")
        self.temperatures = Temperatures(initial_temperature, span, learn, mlp)
        self.meta_objective = meta_objective
        self.alpha = (0.5 if distillation_token else 0.0) if alpha is None else alpha
        check.fraction("alpha", self.alpha)
        if distillation_token and self.alpha == 0:
            raise ValueError(
                "alpha must be above 0 with a distillation token: the task loss alone trains the class token."
            )
        self.distillation_token, self.features, self.extra_losses = distillation_token, features, extra_losses
        self.meta_last_epochs, self.meta_active = meta_last_epochs, meta_last_epochs is None

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self.meta_active = self.meta_last_epochs is None or epoch >= epochs - self.meta_last_epochs

    def student_outputs(self, inputs: Tensor) -> Any:
        return self.student(inputs, features=True) if self.features else self.student(inputs)

    @torch.no_grad()
    def teacher_outputs(self, inputs: Tensor) -> Any:
        return self.teacher(inputs, features=True) if self.features else self.teacher(inputs)

    def logits(self, outputs: Any) -> Tensor:
        logits = outputs[0] if self.features else outputs
        if self.distillation_token and not isinstance(logits, Tensor):  # in eval mode some networks return the mean
            return (logits[0] + logits[1]) / 2
        return logits

    def losses(
        self,
        outputs: Any,  # logits [batch, classes], or as the options say
        teacher_outputs: Any,
        targets: Any,  # of the task loss; for cross-entropy [batch] class indices or [batch, classes] probabilities
    ) -> dict[str, Tensor]:
        tau_s, tau_t = self.temperatures()
        taught = outputs[0] if self.features else outputs
        teacher_logits = teacher_outputs[0] if self.features else teacher_outputs
        labels = self._labels(targets)
        if self.distillation_token:
            if isinstance(taught, Tensor) or len(taught) != 2:
                raise ValueError(
                    "With distillation_token the student must return (class logits, distillation logits) in training, "
                    f"got {type(taught).__name__}; timm's distilled models do after set_distilled_training(True)."
                )
            class_logits, taught = taught
        fused = self.alpha > 0 and self.task_loss is cross_entropy and not self.distillation_token
        kd = kd_loss(
            taught,
            teacher_logits,
            labels if fused else None,
            alpha=self.alpha,
            student_temperature=tau_s,
            teacher_temperature=tau_t,
            divergence="soft_ce",
            scale="none",
        )
        parts = {"kd": kd}
        if self.alpha > 0 and not fused:
            task = self.task_loss(class_logits if self.distillation_token else taught, labels)
            parts = {"task": self.alpha * task, "kd": (1 - self.alpha) * kd}
        if self.extra_losses is not None:
            extra = self.extra_losses(outputs, teacher_outputs, targets)
            if not extra.keys().isdisjoint(parts):
                raise ValueError(f"extra_losses must name parts other than {', '.join(parts)}, got {', '.join(extra)}.")
            parts |= extra
        return parts

    def validation_loss(self, outputs: Any, targets: Any) -> Tensor:
        targets = self._labels(targets)
        if self.meta_objective == "incorrect_brier":
            return incorrect_brier(self.logits(outputs), targets)
        return super().validation_loss(outputs, targets)

    def meta_parameters(self):
        return self.temperatures.parameters()

    def _labels(self, targets: Any) -> Any:
        return targets[0] if self.extra_losses is not None and isinstance(targets, tuple | list) else targets
