"""What the methods on feature maps share: networks called with ``features=True``, and their features as maps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kdfast.methods.base import Distiller, Loss

Features = tuple[Tensor, list[Tensor]]  # logits [batch, classes], features of [batch, channels_i, height_i, width_i]
PREFIX_TOKENS = 5  # a class token, a distillation token or registers: at most so many before the patches


class FeatureDistiller(Distiller):
    """A student and a teacher that return (logits, features) when called with ``features=True``.

    Args:
        student: returns logits [batch, classes] and a list of features, each [batch, channels, height, width] or
            [batch, tokens, channels].
        teacher: the same, with as many features where the method pairs them.
        student_channels: channels of the student's features; by default its `widths`.
        teacher_channels: the same of the teacher's.
        paired: whether feature i of the student belongs to feature i of the teacher.
        task_loss, validation_loss: see `Distiller`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        student_channels: Sequence[int] | None = None,
        teacher_channels: Sequence[int] | None = None,
        paired: bool = True,
        task_loss: Loss = cross_entropy,
        validation_loss: Loss | None = None,
    ):
        super().__init__(student, teacher, task_loss=task_loss, validation_loss=validation_loss)
        name = type(self).__name__
        self.student_channels = channels_of(name, "student", student, student_channels)
        self.teacher_channels = channels_of(name, "teacher", teacher, teacher_channels)
        if paired and len(self.student_channels) != len(self.teacher_channels):
            raise ValueError(
                f"{name} pairs features, so student and teacher must have as many, got {len(self.student_channels)} "
                f"and {len(self.teacher_channels)}; wrap one in kdfast.models.Tapped with the layers to pair."
            )

    def student_outputs(self, inputs: Tensor) -> Features:
        return self.student(inputs, features=True)

    @torch.no_grad()
    def teacher_outputs(self, inputs: Tensor) -> Features:
        return self.teacher(inputs, features=True)

    def logits(self, outputs: Features) -> Tensor:
        return outputs[0]

    def maps(self, outputs: Any, teacher_outputs: Any) -> tuple[list[Tensor], list[Tensor]]:
        """The features of both as maps [batch, channels, height, width], as many as the method was built for."""
        students, teachers = outputs[1], teacher_outputs[1]
        if (len(students), len(teachers)) != (len(self.student_channels), len(self.teacher_channels)):
            raise ValueError(
                f"{type(self).__name__} was built for {len(self.student_channels)} student and "
                f"{len(self.teacher_channels)} teacher features, got {len(students)} and {len(teachers)}; give "
                "student_channels and teacher_channels, one number a feature."
            )
        return [as_map(x) for x in students], [as_map(x) for x in teachers]


def as_map(
    feature: Tensor,  # [batch, channels, height, width] or [batch, tokens, channels]
) -> Tensor:  # [batch, channels, height, width]
    """A feature as a map: a transformer's patches in their square, without the tokens before them.

    Raises:
        ValueError: where the tokens are no square after at most 5 others (class, distillation, registers).
    """
    if feature.dim() == 4:
        return feature
    if feature.dim() != 3:
        raise ValueError(
            "A feature must be [batch, channels, height, width] or [batch, tokens, channels], got "
            f"{list(feature.shape)}."
        )
    tokens = feature.shape[1]
    for before in range(min(PREFIX_TOKENS + 1, tokens)):
        side = round((tokens - before) ** 0.5)
        if side * side == tokens - before:
            return feature[:, before:].transpose(1, 2).unflatten(2, (side, side))
    raise ValueError(
        f"A feature of {tokens} tokens is no square of patches after 0 to {PREFIX_TOKENS} other tokens; let the "
        "network return it as [batch, channels, height, width]."
    )


def channels_of(method: str, role: str, network: nn.Module, channels: Sequence[int] | None) -> tuple[int, ...]:
    """The channels of a network's features: those given, or its `widths`."""
    channels = getattr(network, "widths", None) if channels is None else channels
    if channels is None:
        raise ValueError(
            f"{method} needs {role}_channels, the channels of each feature of the {role}: a {type(network).__name__} "
            "does not tell them in `widths`; wrap it in kdfast.models.Tapped with the layers to use "
            f"(--{role}-layers on the command line)."
        )
    return tuple(channels)


def check_weight(name: str, value: float) -> float:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}.")
    return float(value)
