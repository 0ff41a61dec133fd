"""Self-Guidance: random sub-networks of a residual network learn from the full one."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from kdfast.losses.kd_kl import kd_loss
from kdfast.methods.base import Distiller, Loss
from kdfast.methods.stochastic_depth import branch_parameters, linear_survival, residual_branches, scaled
from kdfast.models.tapped import bare

TEACHER_GRADIENTS = ("task", "all", "none")
BATCH_NORMS = ("teacher", "student", "both")
DIVERGENCES = ("forward_kl", "reverse_kl")


class GuidedOutputs(NamedTuple):
    """Logits [batch, classes] of the full network, and in training those of the sub-network."""

    full: Tensor
    sub: Tensor | None


class SelfGuidance(Distiller):
    """One network as teacher and student: whole, and with residual branches left out at random.

        student     H_l = ReLU(b_l f_l(H_{l-1}) + H_{l-1}),   b_l ~ Bernoulli(p_l), drawn once a batch
        teacher     H_l = ReLU(p_l f_l(H_{l-1}) + H_{l-1}),   p_l = 1 - (l / L)(1 - p_L),   l = 1 ... L
        train       CE(student, labels) + CE(teacher, labels) + strength * tau^2 * KL(teacher || student)

    Both passes share all parameters. In eval mode there is the teacher's pass alone. `export` is the plain network with
    p_l multiplied into the last layer of each branch: bit for bit the teacher.

    Args:
        student: a residual network that returns logits [batch, classes]: kdfast's, torchvision's and timm's ResNets,
            timm's vision transformers, whose attention and MLP are a residual branch each; or any, with `branches`.
        last_survival: p_L, in (0, 1]; 0.5 as in stochastic depth, whose settings the paper takes.
        strength: the paper's lambda, 0.25.
        temperature: tau > 0, of both; the paper's 3.
        teacher_gradient: "task": the teacher learns from the labels and is a constant to the divergence; "all": it
            learns from the divergence too; "none": not at all, the paper's ablation without its backward pass. The paper
            has the teacher learn and does not say from what; a constant target is what the code of ONE has, from which
            the paper takes tau^2.
        divergence: "forward_kl", KL(teacher || student), as in distillation; or "reverse_kl". The paper writes
            KL(student, teacher) and gives no formula.
        batch_norm: whose pass moves the running statistics: the "teacher"'s, which is what is deployed; the
            "student"'s; or "both", one after the other, as two plain calls would. Each pass is normalised by its own
            batch. The paper does not say.
        branches: names of the last layers of the residual branches, from the first to the last; found by default, see
            `kdfast.methods.stochastic_depth.residual_branches`.
        task_loss, validation_loss: see `Distiller`.

    Attributes:
        survival: p_l, [branches].

    Source: Zheng, Peng, "Self-Guidance: Improve Deep Neural Network Generalization via Knowledge Distillation", WACV
    2022, equations 3 to 5 and algorithm 1; survival: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016
    (arXiv:1603.09382).

    Example:
        >>> distiller = SelfGuidance(CifarResNet(32))
        >>> optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1, momentum=0.9, nesterov=True)
        >>> parts = distiller.losses(distiller.student_outputs(x), distiller.teacher_outputs(x), y)
        >>> sum(parts.values()).backward()
        >>> plain = distiller.export()
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        last_survival: float = 0.5,
        strength: float = 0.25,
        temperature: float = 3.0,
        teacher_gradient: str = "task",
        divergence: str = "forward_kl",
        batch_norm: str = "teacher",
        branches: Sequence[str] | None = None,
        task_loss: Loss = cross_entropy,
        validation_loss: Loss | None = None,
    ):
        super().__init__(student, task_loss=task_loss, validation_loss=validation_loss)
        for name, value, allowed in (
            ("teacher_gradient", teacher_gradient, TEACHER_GRADIENTS),
            ("divergence", divergence, DIVERGENCES),
            ("batch_norm", batch_norm, BATCH_NORMS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
        if not 0 < last_survival <= 1:
            raise ValueError(f"last_survival must be a probability in (0, 1], got {last_survival}.")
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength must be finite and not negative, got {strength}.")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {temperature}.")
        self.branches = list(residual_branches(student) if branches is None else branches)
        self._scales = branch_parameters(student, self.branches)
        self.register_buffer("survival", linear_survival(len(self.branches), last_survival), persistent=False)
        self.strength, self.temperature, self.divergence = strength, temperature, divergence
        self.teacher_gradient, self.batch_norm = teacher_gradient, batch_norm

    def student_outputs(self, inputs: Tensor) -> GuidedOutputs:
        if not self.training:
            return GuidedOutputs(self._run(inputs, self.survival), None)
        sub = self._run(inputs, torch.bernoulli(self.survival), keep=self.batch_norm != "teacher")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.teacher_gradient != "none"):
            full = self._run(inputs, self.survival, keep=self.batch_norm != "student")
        return GuidedOutputs(full, sub)

    def _run(self, inputs: Tensor, factors: Tensor, keep: bool = True) -> Tensor:
        """The network with its branches times `factors` [branches]; where not to `keep` them, its buffers stay as they are."""
        tensors = scaled(self.student, self._scales, factors)
        if not keep:
            tensors |= {name: buffer.clone() for name, buffer in self.student.named_buffers()}
        return functional_call(self.student, tensors, (inputs,))

    def logits(self, outputs: GuidedOutputs) -> Tensor:
        return outputs.full

    def losses(self, outputs: GuidedOutputs, teacher_outputs: Any, targets: Any) -> dict[str, Tensor]:
        full, sub = outputs
        parts = {} if self.teacher_gradient == "none" and sub is not None else {"full": self.task_loss(full, targets)}
        if sub is not None:
            target = full if self.teacher_gradient == "all" else full.detach()
            soft = kd_loss(sub, target, student_temperature=self.temperature, divergence=self.divergence)
            parts |= {"sub": self.task_loss(sub, targets), "guidance": self.strength * soft}
        return parts

    def export(self) -> nn.Module:
        """A copy of the network, the survival probabilities multiplied into the last layer of each residual branch."""
        plain = copy.deepcopy(self.student)
        with torch.no_grad():
            for name, value in scaled(self.student, self._scales, self.survival).items():
                plain.get_parameter(name).copy_(value)
        return bare(plain)
