"""DistPro: weights for all pathways between student and teacher features, learned on validation data."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kdfast.losses.pathways import pathway_distances, pathway_loss
from kdfast.meta.process import Process, ProcessStep
from kdfast.methods.base import Loss
from kdfast.methods.features import FeatureDistiller, Features
from kdfast.methods.pathway_weights import PathwayWeights, constant
from kdfast.methods.transforms import TRANSFORMS

PATHWAYS = ("full", "triangular")


def inner_product(a: Tensor, b: Tensor) -> Tensor:  # of one shape, to a scalar
    a, b = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (a, b))
    if not (a.is_contiguous() and b.is_contiguous()) and a.dim() == 4:  # channels_last: in memory's order
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.dot(a.flatten(), b.flatten())


class DistPro(FeatureDistiller):
    """Every student feature to every teacher feature through every transform, weighted by what validation says.

    Train loss: task(student, labels) + scale * sum_p alpha_p * hcl(transform_p(student feature), teacher feature).

    *Search*: alpha is learned with `meta_kd_step`; record it each step in a `Process`. *Retrain*: `follow` a stored
    process, stretched to the training's length, with ordinary steps on all the data; pathways whose raw weight is
    at most `clip` are not computed.

    Args:
        student: see `FeatureDistiller`; features may be maps or a transformer's tokens.
        teacher: the same.
        student_channels, teacher_channels: see `FeatureDistiller`.
        transforms: names of the candidates, of "conv1", "conv2", "conv3", "complex" (see `kdfast.methods.transforms`).
        connections: "full": every student feature to every teacher feature; "triangular": to those not deeper than
            itself, as in the published code and the paper's 15 pathways on ImageNet.
        attention: of the transforms: "linear", "sigmoid" or "none".
        normalisation: of the weights, see `PathwayWeights`.
        bias: the paper's g.
        scale: factor on the weighted sum. The paper names none.
        clip: the paper's threshold on the raw weights.
        task_loss, validation_loss: see `Distiller`.

    Attributes:
        pathways: names of the pathways, "s0-t1-conv2" for the student's first feature to the teacher's second.
        weights: the learned `PathwayWeights`.

    Source: Deng et al., "DistPro: Searching A Fast Knowledge Distillation Process via Meta Optimization", ECCV 2022
    (arXiv:2204.05547). Three features each and three transforms make its 27 pathways.

    Example:
        >>> distiller = DistPro(student, teacher)
        >>> optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1, momentum=0.9)
        >>> meta_optimizer = torch.optim.Adam(distiller.meta_parameters(), lr=0.05)
        >>> process = Process(distiller.pathways)
        >>> for train_batch, validation_batch in search:
        ...     process.record(distiller.weights(), distiller.weights.raw)
        ...     meta_kd_step(distiller, train_batch, validation_batch, optimizer, meta_optimizer)
        >>> final = DistPro(fresh_student, teacher)
        >>> optimizer = torch.optim.SGD(final.inner_parameters(), lr=0.1, momentum=0.9)
        >>> final.follow(process.resample(steps))
        >>> for step, batch in enumerate(training):
        ...     final.set_step(step)
        ...     ordinary_step(final, batch, optimizer)
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        student_channels: Sequence[int] | None = None,
        teacher_channels: Sequence[int] | None = None,
        transforms: Sequence[str] = ("conv1", "conv2", "conv3"),
        connections: str = "full",
        attention: str = "linear",
        normalisation: str = "biased_softmax",
        bias: float = 1.0,
        scale: float = 1.0,
        clip: float = 0.5,
        task_loss: Loss = cross_entropy,
        validation_loss: Loss | None = None,
    ):
        super().__init__(
            student,
            teacher,
            student_channels=student_channels,
            teacher_channels=teacher_channels,
            paired=False,
            task_loss=task_loss,
            validation_loss=validation_loss,
        )
        if connections not in PATHWAYS:
            raise ValueError(f"connections must be one of {', '.join(map(repr, PATHWAYS))}, got {connections!r}.")
        unknown = [name for name in transforms if name not in TRANSFORMS]
        if unknown or not transforms:
            raise ValueError(
                f"transforms must be one or more of {', '.join(map(repr, TRANSFORMS))}, got {tuple(transforms)}."
            )
        self._ends, self.pathways, blocks = [], [], []
        for s, narrow in enumerate(self.student_channels):
            for t, wide in enumerate(self.teacher_channels):
                if connections == "triangular" and t > s:
                    continue
                for name in transforms:
                    self._ends.append((s, t))
                    self.pathways.append(f"s{s}-t{t}-{name}")
                    blocks.append(TRANSFORMS[name](narrow, wide, attention=attention))
        self.transforms = nn.ModuleList(blocks)
        self.weights = PathwayWeights(len(blocks), bias, normalisation=normalisation)
        self.scale, self.clip = scale, clip
        self._process: Process | None = None
        self._record: dict[int, Tensor] | None = None  # where each pathway's gradient in its student feature is put
        self._without_pathways = False

    def losses(
        self,
        outputs: Features,
        teacher_outputs: Features,
        targets: Tensor,  # [batch] class indices, or [batch, classes] probabilities
    ) -> dict[str, Tensor]:
        logits, features = outputs
        if self._without_pathways:
            return {"task": self.task_loss(logits, targets), "pathways": logits.new_zeros(())}
        if self._process is None:
            weights, kept = self.weights(), range(len(self.pathways))
        else:
            weights, kept = self._step_weights.to(logits.device, non_blocking=True), self._kept
        students, teachers = self._ends_met(features, teacher_outputs[1], kept)
        pathways = pathway_loss(students, teachers, self.scale * weights) if students else weights.sum()  # of none: 0
        return {"task": self.task_loss(logits, targets), "pathways": pathways}

    def losses_and_slope(self, outputs: Features, teacher_outputs: Features, targets: Tensor):
        """The derivative of pathway p along a tangent is the inner product of it with the gradient that the backward
        pass sends back through p, divided by the weight: no second pass through the transforms."""
        if self._process is not None:
            return super().losses_and_slope(outputs, teacher_outputs, targets)
        record = self._record = {}
        try:
            parts = self.losses(outputs, teacher_outputs, targets)
        finally:
            self._record = None

        def slope(tangents: Features, factor: float | Tensor, general: Callable[[], Tensor]) -> Tensor:
            moved, _ = self.maps(tangents, teacher_outputs)
            weights = self.weights()  # [pathways]
            dots = [inner_product(record[p], moved[s]) if p in record else None for p, (s, _) in enumerate(self._ends)]
            dots = torch.stack([weights.new_zeros(()) if x is None else x for x in dots])
            taken = (factor * self.scale) * weights.detach()
            slopes = torch.where(taken != 0, dots / taken, 0.0)  # at 0 all five normalisations have derivative 0
            self._without_pathways = True
            try:
                rest = general()
            finally:
                self._without_pathways = False
            return rest + self.scale * (weights * slopes).sum()

        return parts, slope

    def _noted(self, feature: Tensor, pathway: int) -> Tensor:
        """The student feature as the pathway sees it: where wanted, what its gradient is through this pathway."""
        record = self._record
        if record is None or not feature.requires_grad:
            return feature
        alias = feature.view_as(feature)
        alias.register_hook(lambda gradient: record.__setitem__(pathway, gradient))
        return alias

    def pathway_losses(
        self,
        student_features: list[Tensor],  # of [batch, channels_s, height_s, width_s]
        teacher_features: list[Tensor],  # of [batch, channels_t, height_t, width_t]
        kept: Sequence[int],
    ) -> Tensor:  # [kept]
        """The distance of each pathway in `kept`, by index into `pathways`."""
        students, teachers = self._ends_met(student_features, teacher_features, kept)
        return pathway_distances(students, teachers) if students else student_features[0].new_zeros(0)

    def _ends_met(
        self, student_features: list[Tensor], teacher_features: list[Tensor], kept: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """For each pathway in `kept` the transformed student's feature and the teacher's, of one shape."""
        student_features, teacher_features = self.maps((None, student_features), (None, teacher_features))
        ends = [self._ends[p] for p in kept]
        moved = [
            self.transforms[p](self._noted(student_features[s], p), teacher_features[t].shape[2:])
            for p, (s, t) in zip(kept, ends, strict=True)
        ]
        return moved, [teacher_features[t] for _, t in ends]

    def meta_parameters(self):
        """The weights while they are learned; none while a process is followed."""
        return self.weights.parameters() if self._process is None else iter(())

    def inner_parameters(self):
        """The student and the transforms."""
        learned = {id(p) for p in self.weights.parameters()}
        return (p for p in self.parameters() if id(p) not in learned)

    def follow(self, process: Process) -> None:
        """Take the weights from a stored process from now on, beginning at its first step.

        A process of other pathways is carried over first, with `kdfast.methods.transfer`.
        """
        if process.pathways != self.pathways:
            raise ValueError(
                f"The process must be of this DistPro's {len(self.pathways)} pathways ({self.pathways[0]}, ...), got "
                f"{len(process.pathways)} ({', '.join(process.pathways[:1])}, ...); build both with the same "
                "transforms and features, or carry it over with kdfast.methods.transfer."
            )
        self._process = process
        self.set_step(0)

    def fix(self, step: ProcessStep | None = None) -> None:
        """Weights that do not change, the paper's two baselines.

        Args:
            step: "use alpha_T": ``process.at(len(process) - 1)``; by default "equally weighted".
        """
        self.follow(constant(self.pathways, step))

    def start_step(self, step: int) -> None:
        """Where a process is followed: its weights of this step, at its end the last ones."""
        if self._process is not None:
            self.set_step(min(step, len(self._process) - 1))

    def set_step(self, step: int) -> None:
        """The weights of this step of the process that is followed; the pathways at or below `clip` are dropped."""
        if self._process is None:
            raise ValueError("set_step needs a process to follow; call follow(process) first.")
        weights, raw = self._process.at(step)
        self._kept = (raw > self.clip).nonzero().flatten().tolist()
        self._step_weights = weights[self._kept]

    @property
    def dropped_share(self) -> float:
        """The share of pathways not computed in this step, in [0, 1]; `Process.dropped_share` has the whole run's."""
        return 0.0 if self._process is None else 1 - len(self._kept) / len(self.pathways)

    @torch.no_grad()
    def saved_share(self, process: Process, inputs: Tensor) -> float:
        """The share of the transforms' multiply-adds that dropping saves over a whole process, in [0, 1].

        Args:
            process: of this DistPro's pathways.
            inputs: a batch [batch, ...], whose features' sizes are counted with.
        """
        from torch.utils.flop_counter import FlopCounterMode  # which imports Triton

        mode = self.training
        self.eval()  # so that no statistics change
        students, teachers = self.maps(self.student_outputs(inputs), self.teacher_outputs(inputs))
        costs = []
        for (s, t), transform in zip(self._ends, self.transforms, strict=True):
            with FlopCounterMode(display=False) as counter:
                transform(students[s], teachers[t].shape[2:])
            costs.append(counter.get_total_flops())
        self.train(mode)
        costs = torch.tensor(costs, dtype=torch.float64)
        dropped = (process.raw <= self.clip).double()  # [steps, pathways]
        return ((dropped @ costs).mean() / costs.sum()).item()
