"""DistPro: weights for all pathways between student and teacher features, learned on validation data."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kdfast.losses.pathways import pathway_distances, pathway_loss
from kdfast.meta.process import Process
from kdfast.methods.base import Distiller, Loss
from kdfast.methods.transforms import TRANSFORMS

Features = tuple[Tensor, list[Tensor]]  # logits [batch, classes], features of [batch, channels_i, height_i, width_i]


class PathwayWeights(nn.Module):
    """Biased softmax: alpha_p = exp(a_p) / (sum_q exp(a_q) + exp(bias)), so that the weights sum to less than 1.

    Args:
        count: number of pathways.
        bias: the paper's g.
        initial: value all `raw` parameters start at; equal to the bias, each weight starts at 1 / (count + 1).
    """

    def __init__(self, count: int, bias: float = 1.0, initial: float = 1.0):
        super().__init__()
        self.raw = nn.Parameter(torch.full((count,), initial))
        self.bias = bias

    def forward(self) -> Tensor:  # [pathways]
        return torch.cat([self.raw, self.raw.new_full((1,), self.bias)]).softmax(0)[:-1]


class DistPro(Distiller):
    """Every student feature to every teacher feature through every transform, weighted by what validation says.

    Train loss: task(student, labels) + scale * sum_p alpha_p * hcl(transform_p(student feature), teacher feature).

    *Search*: alpha is learned with `meta_kd_step`; record it each step in a `Process`. *Retrain*: `follow` a stored
    process, stretched to the training's length, with ordinary steps on all the data; pathways whose raw weight is
    at most `clip` are not computed.

    Args:
        student: called with ``features=True`` returns logits [batch, classes] and a list of feature maps.
        teacher: the same.
        student_channels: channels of the student's features; by default its `widths`.
        teacher_channels: the same of the teacher's.
        transforms: names of the candidates, of "conv1", "conv2", "conv3" (see `kdfast.methods.transforms`).
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
        >>> process = Process(distiller.pathways)
        >>> for train_batch, validation_batch in search:
        ...     process.record(distiller.weights(), distiller.weights.raw)
        ...     meta_kd_step(distiller, train_batch, validation_batch, optimizer, meta_optimizer)
        >>> final = DistPro(fresh_student, teacher)
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
        scale: float = 1.0,
        clip: float = 0.5,
        task_loss: Loss = cross_entropy,
        validation_loss: Loss | None = None,
    ):
        super().__init__(student, teacher, task_loss=task_loss, validation_loss=validation_loss)
        self.student_channels = _channels("student", student, student_channels)
        self.teacher_channels = _channels("teacher", teacher, teacher_channels)
        unknown = [name for name in transforms if name not in TRANSFORMS]
        if unknown or not transforms:
            raise ValueError(
                f"transforms must be one or more of {', '.join(map(repr, TRANSFORMS))}, got {tuple(transforms)}."
            )
        self._ends, self.pathways, blocks = [], [], []
        for s, narrow in enumerate(self.student_channels):
            for t, wide in enumerate(self.teacher_channels):
                for name in transforms:
                    self._ends.append((s, t))
                    self.pathways.append(f"s{s}-t{t}-{name}")
                    blocks.append(TRANSFORMS[name](narrow, wide))
        self.transforms = nn.ModuleList(blocks)
        self.weights = PathwayWeights(len(blocks))
        self.scale, self.clip = scale, clip
        self._process: Process | None = None

    def student_outputs(self, inputs: Tensor) -> Features:
        return self.student(inputs, features=True)

    @torch.no_grad()
    def teacher_outputs(self, inputs: Tensor) -> Features:
        return self.teacher(inputs, features=True)

    def logits(self, outputs: Features) -> Tensor:
        return outputs[0]

    def losses(
        self,
        outputs: Features,
        teacher_outputs: Features,
        targets: Tensor,  # [batch] class indices, or [batch, classes] probabilities
    ) -> dict[str, Tensor]:
        logits, features = outputs
        if self._process is None:
            weights, kept = self.weights(), range(len(self.pathways))
        else:
            weights, kept = self._step_weights.to(logits.device, non_blocking=True), self._kept
        students, teachers = self._ends_met(features, teacher_outputs[1], kept)
        pathways = pathway_loss(students, teachers, self.scale * weights) if students else weights.sum()  # of none: 0
        return {"task": self.task_loss(logits, targets), "pathways": pathways}

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
        if (len(student_features), len(teacher_features)) != (len(self.student_channels), len(self.teacher_channels)):
            raise ValueError(
                f"DistPro was built for {len(self.student_channels)} student and {len(self.teacher_channels)} teacher "
                f"features, got {len(student_features)} and {len(teacher_features)}; give student_channels and "
                "teacher_channels, one number a feature."
            )
        ends = [self._ends[p] for p in kept]
        moved = [
            self.transforms[p](student_features[s], teacher_features[t].shape[2:])
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
        """Take the weights from a stored process from now on, beginning at its first step."""
        if process.pathways != self.pathways:
            raise ValueError(
                f"The process must be of this DistPro's {len(self.pathways)} pathways ({self.pathways[0]}, ...), got "
                f"{len(process.pathways)} ({', '.join(process.pathways[:1])}, ...); build both with the same "
                "transforms and features."
            )
        self._process = process
        self.set_step(0)

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


def _channels(role: str, network: nn.Module, channels: Sequence[int] | None) -> tuple[int, ...]:
    channels = getattr(network, "widths", None) if channels is None else channels
    if channels is None:
        raise ValueError(
            f"DistPro needs {role}_channels, the channels of each feature of the {role}: a {type(network).__name__} "
            "does not tell them in `widths`."
        )
    return tuple(channels)
