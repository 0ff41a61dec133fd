"""StageByStage: the student's stages learn the teacher's features one after another, then the head the task."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kdfast.losses.pathways import pathway_loss
from kdfast.methods.base import Distiller, Loss
from kdfast.methods.features import as_map
from kdfast.methods.frozen import FrozenCache
from kdfast.methods.stages import check_whole, first_stages_halved, image_of, measured_channels

Parts = tuple[Sequence[nn.Module], nn.Module]  # the stages in order, and the head
DROPS = (0.3, 0.6, 0.9)  # of a phase: the paper's epochs 18, 36, 54 of 60
LEVELS = 3  # drops by 10 from the first learning rate to the one that ends a stage: the paper's 0.01 and 1e-5
IMPROVEMENT = 1e-4  # relative, below which the distance counts as not decreasing


class StageByStage(Distiller):
    """Phase i trains stage i of the student alone, on the distance of its output to that of the teacher's stage i.

    Stages before it are frozen in eval mode, stages after it do not run, the teacher runs as far as stage i. After the
    last stage the head is trained alone on the task loss. There is no loss weight. A 1x1 convolution brings the
    student's channels to the teacher's where they differ; it serves the distance only. The student's map is resized
    (bilinear) to the teacher's.

    A trainer calls `start_epoch` and `end_epoch`, and holds one optimizer of `inner_parameters()` for the whole
    training: what is frozen has no gradient, so neither momentum nor weight decay moves it. `lr_factor` is the paper's
    factor on the learning rate, which starts again at 1 in each phase.

    Args:
        student: with a method `parts()`, to a list of stages and a head, so that ``head(stage_n(..stage_1(x)))`` is
            what it returns; or give `student_parts`.
        teacher: the same, with as many stages.
        schedule: "even": every phase takes the same number of epochs, what is left over goes to the head; "plateau": a
            phase also ends when its learning rate has fallen thrice; or the epochs of each stage, the head having the
            rest.
        patience: for "plateau", epochs without a smaller distance after which the learning rate falls by 10.
        halved: how many of the first stages of both networks are cut in two, for more stages than resolutions.
        cache: inputs of which the frozen stages' and the teacher's outputs are kept, for training without augmentation;
            0: none. An input is known by its content. The cache holds one phase and is in no checkpoint.
        student_parts: the student's stages and head; they must hold all its parameters.
        teacher_parts: the same of the teacher.
        example: an input [batch, ...] with which the stages' channels are measured; by default a black image, of 32x32
            or the student's `image_shape`.
        task_loss: see `Distiller`; only the head is trained on it.
        validation_loss: see `Distiller`.

    Attributes:
        stage: int64 scalar, a buffer: the stage that is trained; the number of stages when it is the head.
        lr_factor: factor on the learning rate in this epoch, 1, 0.1, 0.01 or 0.001.

    Source: Gao et al., "An Embarrassingly Simple Approach for Knowledge Distillation", 2018 (arXiv:1812.01819).

    Example:
        >>> distiller = StageByStage(student, teacher)
        >>> optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.01, momentum=0.9)
        >>> for epoch in range(240):
        ...     distiller.start_epoch(epoch, 240)
        ...     optimizer.param_groups[0]["lr"] = 0.01 * distiller.lr_factor
        ...     for x, y in loader:
        ...         ordinary_step(distiller, (x, y), optimizer)
        ...     distiller.end_epoch(None)
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        schedule: str | Sequence[int] = "even",
        patience: int = 5,
        halved: int = 0,
        cache: int = 0,
        student_parts: Parts | None = None,
        teacher_parts: Parts | None = None,
        example: Tensor | None = None,
        task_loss: Loss = cross_entropy,
        validation_loss: Loss | None = None,
    ):
        super().__init__(student, teacher, task_loss=task_loss, validation_loss=validation_loss)
        stages, head = _parts("student", student, student_parts)
        teacher_stages, _ = _parts("teacher", teacher, teacher_parts)
        if len(stages) != len(teacher_stages) or not len(stages):
            raise ValueError(
                f"Student and teacher must have as many stages, at least 1, got {len(stages)} and "
                f"{len(teacher_stages)}; give student_parts and teacher_parts."
            )
        stages, teacher_stages = (first_stages_halved(s, halved) for s in (stages, teacher_stages))
        if not isinstance(schedule, str):
            schedule = tuple(schedule)
        if schedule not in ("even", "plateau") and (isinstance(schedule, str) or len(schedule) != len(stages)):
            raise ValueError(
                f"schedule must be 'even', 'plateau' or the epochs of each of the {len(stages)} stages, "
                f"got {schedule!r}."
            )
        if patience < 1:
            raise ValueError(f"patience must be at least 1 epoch, got {patience}.")
        self.schedule, self.patience = schedule, patience
        self._parts = (stages, head, teacher_stages)  # in a tuple: they are registered as the student's already
        with torch.no_grad():
            image = image_of(student, stages, example)
            check_whole(student, stages, head, image)
            channels = zip(*(measured_channels(s, image) for s in (stages, teacher_stages)), strict=True)
        self.adapters = nn.ModuleList(nn.Identity() if a == b else nn.Conv2d(a, b, 1) for a, b in channels)
        self.register_buffer("stage", torch.tensor(0))
        # of the plateau: the epoch this phase began, drops of the learning rate, epochs without improvement
        self.register_buffer("progress", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("best", torch.tensor(float("inf")))
        self.register_buffer("distance_sum", torch.zeros(2))  # of this epoch, and its count of steps
        self.lr_factor = 1.0
        self._cache = FrozenCache(cache)
        self.register_load_state_dict_post_hook(lambda module, _: module._begin(int(module.stage)))
        self._begin(0)

    @property
    def phases(self) -> int:
        """The stages and the head."""
        return len(self._parts[0]) + 1

    def set_stage(self, stage: int) -> None:
        """Train this stage from now on, counted from 0; the number of stages means the head."""
        if not 0 <= stage < self.phases:
            raise ValueError(f"stage must be in [0, {self.phases - 1}], the last meaning the head, got {stage}.")
        self.stage.fill_(stage)
        self.progress.zero_()
        self.best.fill_(float("inf"))
        self.lr_factor = 1.0
        self._begin(stage)

    def _begin(self, stage: int) -> None:
        self._at = stage  # the buffer, where reading it does not wait for a device
        self._cache.clear()
        stages, head, _ = self._parts
        for phase, module in enumerate([*stages, head]):
            for p in module.parameters():
                p.requires_grad_(phase == stage)
                p.grad = None if phase != stage else p.grad  # momentum and weight decay skip what has no gradient
        for phase, adapter in enumerate(self.adapters):
            for p in adapter.parameters():
                p.requires_grad_(phase == stage)
                p.grad = None if phase != stage else p.grad
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        if mode:
            self.student.eval()
            stages, head, _ = self._parts
            (*stages, head)[self._at].train()
        return self

    def student_outputs(self, inputs: Tensor) -> Any:
        """In training the feature of the stage that is trained, or the logits of the head; in eval mode the logits."""
        if not self.training:
            return self.student(inputs)
        stages, head, _ = self._parts
        x = self._frozen("student", stages[: self._at], inputs)
        return (head if self._at == len(stages) else stages[self._at])(x)

    def teacher_outputs(self, inputs: Tensor) -> Tensor | None:
        """The teacher's feature of that stage, without running the teacher any further; None for the head."""
        if self._at == self.phases - 1:
            return None
        return self._frozen("teacher", self._parts[2][: self._at + 1], inputs)

    def _frozen(self, role: str, stages: Sequence[nn.Module], inputs: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            with torch.no_grad():
                for stage in stages:
                    x = stage(x)
            return x

        return self._cache(role, run, inputs) if len(stages) else inputs

    def logits(self, outputs: Any) -> Tensor:
        """Of a feature in training what the rest of the student, not yet trained, makes of it."""
        stages, head, _ = self._parts
        if not self.training or self._at == len(stages):
            return outputs
        with torch.no_grad():
            for stage in stages[self._at + 1 :]:
                outputs = stage(outputs)
            return head(outputs)

    def losses(self, outputs: Tensor, teacher_outputs: Tensor | None, targets: Any) -> dict[str, Tensor]:
        if self._at == len(self._parts[0]):
            loss = self.task_loss(outputs, targets)
            parts = {"task": loss}
        elif not self.training:
            raise ValueError(
                "A stage has its loss in train mode only: in eval mode the student's outputs are its logits."
            )
        else:
            student, teacher = as_map(outputs), as_map(teacher_outputs)
            loss = pathway_loss([self.adapters[self._at](student)], [teacher], distance="mse", resize="bilinear")
            parts = {"distance": loss}
        if self.training:
            self.distance_sum += torch.stack([loss.detach().float(), torch.ones_like(loss, dtype=torch.float32)])
        return parts

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Enter the phase of this epoch, by a schedule of epochs; with "plateau" where the phase's time is up."""
        if epochs < self.phases:
            raise ValueError(f"StageByStage needs at least an epoch a phase, {self.phases} in all, got {epochs}.")
        self.distance_sum.zero_()
        if self.schedule == "plateau":
            began = int(self.progress[0])
            time_up = epoch >= began + (epochs - began) // (self.phases - self._at)
            if self._at < self.phases - 1 and (time_up or int(self.progress[1]) >= LEVELS):
                self._next(epoch)
            self.lr_factor = 0.1 ** int(self.progress[1])
            return
        ends = [epochs // self.phases] * (self.phases - 1) if self.schedule == "even" else self.schedule
        ends = torch.tensor(ends).cumsum(0).tolist()
        if ends[-1] >= epochs:
            raise ValueError(
                f"schedule must leave epochs for the head, got {ends[-1]} for the stages of {epochs} in all."
            )
        phase = sum(epoch >= end for end in ends)
        if phase != self._at:
            self.set_stage(phase)
        begin, end = ([0, *ends][phase], [*ends, epochs][phase])
        share = (epoch - begin) / (end - begin)
        self.lr_factor = 0.1 ** sum(share >= drop for drop in DROPS)

    def end_epoch(self, validation_loss: float | None) -> None:
        """With "plateau": a smaller learning rate, or the next stage from the next epoch on, where nothing improves."""
        if self.schedule != "plateau":
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.distance_sum)  # so that all processes change stage together
        total, count = self.distance_sum.tolist()
        mean = total / max(count, 1)
        began, drops, waited = self.progress.tolist()
        if mean < float(self.best) * (1 - IMPROVEMENT):
            self.best.fill_(mean)
            waited = 0
        else:
            waited += 1
        if waited >= self.patience:
            drops, waited = drops + 1, 0
        last = self._at == self.phases - 1
        self.progress.copy_(torch.tensor([began, min(drops, LEVELS - 1 if last else LEVELS), waited]))

    def _next(self, epoch: int) -> None:
        self.set_stage(self._at + 1)
        self.progress[0] = epoch

    def export(self) -> nn.Module:
        """The bare student; what is frozen in it stays so until ``requires_grad_(True)``."""
        return super().export()


def _parts(role: str, network: nn.Module, parts: Parts | None) -> tuple[list[nn.Module], nn.Module]:
    if parts is None:
        if not hasattr(network, "parts"):
            raise ValueError(
                f"StageByStage needs {role}_parts, a list of stages and the head: a {type(network).__name__} has no "
                "method parts() that tells them; give them, or wrap it in kdfast.models.Tapped with the layers that "
                f"end the stages (--{role}-layers on the command line)."
            )
        parts = network.parts()
    stages, head = parts
    return list(stages), head
