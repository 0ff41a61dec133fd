"""Self-Guidance: random sub-networks of a residual network learn from the full one."""

import copy
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from kdfast.losses.kd_kl import kd_loss
from kdfast.meta.kinks import visible
from kdfast.methods.base import Distiller, Loss
from kdfast.methods.left_out import LeftOut
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

    Both passes share all parameters. What the sub-network leaves out does not run, unless the network is compiled or
    captured (see `kdfast.methods.left_out`); the values are the same. In eval mode there is the teacher's pass alone.
    `export` is the plain network with p_l multiplied into the last layer of each branch: bit for bit the teacher.

    Args:
        student: a residual network that returns logits [batch, classes]: kdfast's, torchvision's and timm's ResNets,
            timm's vision transformers, whose attention and MLP are a residual branch each; or any, with `branches`.
        last_survival: p_L, in (0, 1]; 0.5 as in stochastic depth, whose settings the paper takes.
        strength: the paper's lambda, 0.25.
        temperature: tau > 0, of both; the paper's 3.
        teacher_gradient: "task": the teacher learns from the labels and is a constant to the divergence; "all": it
            learns from the divergence too; "none": not at all, the paper's ablation without its backward pass. The
            paper has the teacher learn and does not say from what; a constant target is what the code of ONE has, from
            which the paper takes tau^2.
        divergence: "forward_kl", KL(teacher || student), as in distillation; or "reverse_kl". The paper writes
            KL(student, teacher) and gives no formula.
        batch_norm: whose pass moves the running statistics: the "teacher"'s, which is what is deployed; the
            "student"'s; or "both", one after the other, as two plain calls would. Each pass is normalised by its own
            batch. The paper does not say. What is left out moves none, as in stochastic depth.
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
        survival = linear_survival(len(self.branches), last_survival)
        self.register_buffer("survival", survival, persistent=False)
        self._survival_on_host = survival.clone()
        self._left_out = LeftOut(self.branches)
        self._names = [name for name, _ in student.named_parameters()]
        self.strength, self.temperature, self.divergence = strength, temperature, divergence
        self.teacher_gradient, self.batch_norm = teacher_gradient, batch_norm

    def student_outputs(self, inputs: Tensor) -> GuidedOutputs:
        if not self.training:
            return GuidedOutputs(self._run(inputs, scaled(self.student, self._scales, self.survival)), None)
        sub = self._sub_network(inputs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.teacher_gradient != "none"):
            full = self._run(inputs, scaled(self.student, self._scales, self.survival), self.batch_norm != "student")
        return GuidedOutputs(full, sub)

    def _sub_network(self, inputs: Tensor) -> Tensor:  # [batch, classes]
        keep = self.batch_norm != "teacher"
        if self._is_one_graph():
            return self._run(inputs, scaled(self.student, self._scales, torch.bernoulli(self.survival)), keep)
        on_host = self.survival.device.type == "cpu"
        kept = torch.bernoulli(self.survival if on_host else self._survival_on_host).tolist()
        left_out = [i for i, stays in enumerate(kept) if not stays]
        # multiplied by zero too, for those that LeftOut cannot leave out
        zeros = scaled(self.student, [self._scales[i] for i in left_out], [0.0] * len(left_out))
        with self._left_out(self.student, [self.branches[i] for i in left_out]):
            logits = self._run(inputs, zeros, keep)
        if self.teacher_gradient == "none":  # what is left out has a gradient of zero, so that all processes have it
            logits = logits + 0.0 * sum(attrgetter(name)(self.student).sum() for name in self._names)
        return logits

    def _is_one_graph(self) -> bool:
        """Whether the passes are compiled or captured: one graph for all draws, in which every branch runs."""
        if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return True
        return not visible(self.student)

    def _run(self, inputs: Tensor, tensors: dict[str, Tensor], keep: bool = True) -> Tensor:
        """The network with these parameters instead of its own; its buffers move only where they are to be kept."""
        if not keep:
            tensors = tensors | {name: buffer.clone() for name, buffer in self.student.named_buffers()}
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
