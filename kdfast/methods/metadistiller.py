"""MetaDistiller: a network's early exits learn from soft targets that a generator makes of its deeper features.

The paper's two baselines are here too, as they differ only in the exits' targets: none (deeply-supervised),
or the network's own final output (self-distillation).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kdfast.losses.kd_kl import kd_loss
from kdfast.losses.kd_kl_exits import exits_kd_loss
from kdfast.methods.base import Distiller, Loss
from kdfast.methods.exits import EXITS, Exit, LabelGenerator

META_OBJECTIVES = ("final", "all")
WIDEST_GENERATOR = 128


class ExitOutputs(NamedTuple):
    """The final logits [batch, classes], each early exit's, and each stage's feature map."""

    logits: Tensor
    exits: list[Tensor]
    features: list[Tensor]


class ExitEnsemble(nn.Module):
    """A network and its early exits, as one that returns the mean of all their logits, [batch, classes]."""

    def __init__(self, network: nn.Module, exits: nn.ModuleList):
        super().__init__()
        self.network, self.exits = network, exits

    def forward(self, inputs: Tensor) -> Tensor:
        logits, features = self.network(inputs, features=True)
        early = [exit(feature) for exit, feature in zip(self.exits, features[:-1], strict=True)]
        return torch.stack([logits, *early]).mean(0)


class DeeplySupervised(Distiller):
    """Early exits that learn from the labels alone: CE(final, labels) + weight * sum_k CE(exit_k, labels).

    Args:
        student: called with ``features=True`` returns logits [batch, classes] and a list of K feature maps, one a
            stage.
        weight: factor on the exits' losses. 1 unless given, which is ours.
        exit: layers of an exit, see `kdfast.methods.exits.Exit`: "bottleneck", "sepconv" or "linear".
        channels: of the feature maps; by default the student's `widths`.
        classes: number of logits; by default that of the student's last linear layer.
        strides: of the K-1 exits, how many times larger their maps are than the last stage's; by default each stage
            halves them.
        task_loss, validation_loss: see `Distiller`.

    Source: Lee et al., "Deeply-Supervised Nets", AISTATS 2015 (arXiv:1409.5185), as MetaDistiller compares with it.

    Example:
        >>> distiller = DeeplySupervised(CifarResNet(20))
        >>> parts = distiller.losses(distiller.student_outputs(x), distiller.teacher_outputs(x), y)
        >>> sum(parts.values()).backward()
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        weight: float = 1.0,
        exit: str = "bottleneck",
        channels: Sequence[int] | None = None,
        classes: int | None = None,
        strides: Sequence[int] | None = None,
        task_loss: Loss = cross_entropy,
        validation_loss: Loss | None = None,
    ):
        super().__init__(student, task_loss=task_loss, validation_loss=validation_loss)
        name = type(self).__name__
        self.channels = _channels(name, student, channels)
        self.classes = _classes(name, student, classes)
        early = len(self.channels) - 1
        self.strides = tuple(2 ** (early - k) for k in range(early)) if strides is None else tuple(strides)
        if len(self.strides) != early or min(self.strides) < 1:
            raise ValueError(f"strides must be {early} positive numbers, one an early stage, got {self.strides}.")
        if exit not in EXITS:
            raise ValueError(f"exit must be one of {', '.join(map(repr, EXITS))}, got {exit!r}.")
        odd = [stride for stride in self.strides if stride & (stride - 1)]
        if exit == "sepconv" and odd:
            raise ValueError(f'exit="sepconv" halves the maps, so strides must be powers of two, got {odd[0]}.')
        self.weight, self._kind = weight, exit
        self.exits = nn.ModuleList(
            Exit(self.channels[k], self.channels[-1], self.classes, self.strides[k], exit) for k in range(early)
        )

    def student_outputs(self, inputs: Tensor) -> ExitOutputs:
        logits, features = self.student(inputs, features=True)
        if len(features) != len(self.channels):
            raise ValueError(
                f"{type(self).__name__} was built for {len(self.channels)} feature maps, got {len(features)}; give "
                "channels, one number a feature map."
            )
        exits = [exit(feature) for exit, feature in zip(self.exits, features[:-1], strict=True)]
        return ExitOutputs(logits, exits, features)

    def logits(self, outputs: ExitOutputs) -> Tensor:
        return outputs.logits

    def export_ensemble(self) -> ExitEnsemble:
        """The student with its exits, as one network whose logits [batch, classes] are the mean of all outputs'."""
        return ExitEnsemble(self.student, self.exits)

    def losses(self, outputs: ExitOutputs, teacher_outputs: Any, targets: Any) -> dict[str, Tensor]:
        hard = sum(self.task_loss(logits, targets) for logits in outputs.exits)
        return {"task": self.task_loss(outputs.logits, targets), "exits": self.weight * hard}


class SelfDistillation(DeeplySupervised):
    """Early exits that learn from the labels and the network's own final output.

    Train loss: CE(final, labels) + sum_k [alpha CE(exit_k, labels) + (1 - alpha) tau^2 KL(final || exit_k)]. The final
    output is a constant where it is a target.

    Args:
        student: as for `DeeplySupervised`, as are exit, channels, classes and strides.
        alpha: share of the labels in an exit's loss, in [0, 1]. The default is MetaDistiller's.
        temperature: tau > 0, of both. The default is MetaDistiller's; the method's published codes have 3.

    Source: Zhang et al., "Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self
    Distillation", ICCV 2019 (arXiv:1905.08094), without its distance of features, as MetaDistiller states it.

    Example:
        >>> distiller = SelfDistillation(CifarResNet(20))
        >>> parts = distiller.losses(distiller.student_outputs(x), None, y)
    """

    def __init__(self, student: nn.Module, *, alpha: float = 0.5, temperature: float = 1.0, **options: Any):
        if "weight" in options:
            raise TypeError(f"{type(self).__name__} has no weight; alpha shares an exit's loss out.")
        super().__init__(student, **options)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}.")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {temperature}.")
        self.alpha, self.temperature = alpha, temperature

    def soft_targets(self, outputs: ExitOutputs, teacher_outputs: Any) -> list[Tensor]:
        """Each exit's soft target as logits [batch, classes]."""
        return [outputs.logits.detach()] * len(outputs.exits)

    def losses(self, outputs: ExitOutputs, teacher_outputs: Any, targets: Any) -> dict[str, Tensor]:
        soft = self.soft_targets(outputs, teacher_outputs)
        return {
            "task": self.task_loss(outputs.logits, targets),
            "exits": self._exits_loss(outputs.exits, soft, targets),
        }

    def _exits_loss(self, exits: list[Tensor], soft: list[Tensor], targets: Any) -> Tensor:
        """Equation 4, summed over the exits: in one sweep where the targets are class indices."""
        options = {"alpha": self.alpha, "student_temperature": self.temperature}
        if self.task_loss is not cross_entropy:
            hard = sum(self.task_loss(logits, targets) for logits in exits)
            divergence = exits_kd_loss(exits, soft, student_temperature=self.temperature).sum()
            return self.alpha * hard + (1 - self.alpha) * divergence
        if targets.is_floating_point():
            return sum(kd_loss(logits, target, targets, **options) for logits, target in zip(exits, soft, strict=True))
        return exits_kd_loss(exits, soft, targets, **options).sum()


class MetaDistiller(SelfDistillation):
    """Early exits that learn from the labels and from soft targets of a generator, which validation data teach.

        train       CE(final, labels) + sum_k [alpha CE(exit_k, labels) + (1 - alpha) tau^2 KL(T_k || exit_k)]
        generator   T_k = exit(G_k),   G_k = conv3x3(upsample(G_{k+1}) + conv1x1(F_k)),   G_K = conv1x1(F_K)
        learned     the generator, so that a step of the student on the train loss lowers CE(final, labels) elsewhere

    Needs no teacher. The generator's parameters are the meta-parameters of `kdfast.meta_kd_step`; exits and generator
    are dropped by `export`.

    *When*: in every `meta_every_epochs`-th epoch, from the first on, the training data are split at random into halves,
    for the student's steps and the generator's; in the other epochs steps are ordinary and the generator stands still.
    `start_epoch` says in `meta_active` which it is.

    Args:
        student: as for `DeeplySupervised`, as are exit, channels, classes and strides.
        alpha: share of the labels in an exit's loss, in [0, 1]; the paper's 0.5.
        temperature: tau > 0, of both; the paper's 1.
        meta_every_epochs: the paper's M, 5.
        detach_targets: whether the soft targets are constants to the student, as a teacher's are. The paper does not
            say; if not, the exits' losses also shape the deeper features to be what exits can follow.
        generator_width: channels inside the generator; by default the last stage's, at most 128. The paper names none.
        generator: a module of your own in its place: of the list of K feature maps, to a list of the exits' K-1 logits.
        meta_objective: "final": the validation loss of the final output; "all": the sum over it and all exits. The
            paper says "standard cross entropy loss".
        task_loss, validation_loss: see `Distiller`.

    Attributes:
        generator: the `LabelGenerator`, or yours.
        meta_active: whether the generator learns in this epoch; True until `start_epoch` is called.
        meta_halves: True: each epoch with meta-steps wants two new random halves of the training data.

    Source: Liu et al., "MetaDistiller: Network Self-Boosting via Meta-Learned Top-Down Distillation", ECCV 2020
    (arXiv:2008.12094), equations 3 to 8 and algorithm 1. The paper learns the generator by Adam at 0.1.

    Example:
        >>> distiller = MetaDistiller(CifarResNet(20))
        >>> optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1, momentum=0.9)
        >>> meta_optimizer = torch.optim.Adam(distiller.meta_parameters(), lr=0.1)
        >>> for epoch in range(epochs):
        ...     distiller.start_epoch(epoch, epochs)
        ...     if distiller.meta_active:
        ...         for train_batch, validation_batch in zip(*halves(epoch)):
        ...             meta_kd_step(distiller, train_batch, validation_batch, optimizer, meta_optimizer)
        ...     else:
        ...         for batch in loader:
        ...             ordinary_step(distiller, batch, optimizer)
    """

    meta_halves = True

    def __init__(
        self,
        student: nn.Module,
        *,
        alpha: float = 0.5,
        temperature: float = 1.0,
        meta_every_epochs: int = 5,
        detach_targets: bool = True,
        generator_width: int | None = None,
        generator: nn.Module | None = None,
        meta_objective: str = "final",
        **options: Any,
    ):
        super().__init__(student, alpha=alpha, temperature=temperature, **options)
        if meta_every_epochs < 1:
            raise ValueError(f"meta_every_epochs must be at least 1, got {meta_every_epochs}.")
        if meta_objective not in META_OBJECTIVES:
            allowed = ", ".join(map(repr, META_OBJECTIVES))
            raise ValueError(f"meta_objective must be one of {allowed}, got {meta_objective!r}.")
        width = min(self.channels[-1], WIDEST_GENERATOR) if generator_width is None else generator_width
        if width < 1:
            raise ValueError(f"generator_width must be positive, got {width}.")
        if generator is not None and generator_width is not None:
            raise ValueError(
                "generator_width is of the built-in generator; leave it out beside a generator of your own."
            )
        if generator is None:
            generator = LabelGenerator(self.channels, self.classes, self.strides, width, self._kind)
        self.generator = generator
        self.meta_every_epochs, self.meta_active = meta_every_epochs, True
        self.detach_targets, self.meta_objective = detach_targets, meta_objective

    def learns_in(self, epoch: int) -> bool:
        """Whether the generator learns in this epoch, counted from 0."""
        return epoch % self.meta_every_epochs == 0

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self.meta_active = self.learns_in(epoch)

    def teacher_outputs(self, inputs: Tensor) -> dict[str, list[Tensor]]:
        """An empty place for what a batch's targets are made of, see `soft_targets`."""
        return {}

    def soft_targets(self, outputs: ExitOutputs, teacher_outputs: dict[str, list[Tensor]] | None) -> list[Tensor]:
        """Each exit's soft target as logits [batch, classes].

        Features that are constants must stay those of theta when the meta-gradient displaces the student: its
        difference would else see them move. The first call for a batch, which is at theta, keeps them in
        `teacher_outputs` for those that follow.
        """
        features = outputs.features
        if self.detach_targets:
            constants = {} if teacher_outputs is None else teacher_outputs
            features = constants.setdefault("features", [feature.detach() for feature in features])
        return self.generator(features)

    def validation_loss(self, outputs: ExitOutputs, targets: Any) -> Tensor:
        loss = super().validation_loss(outputs, targets)
        if self.meta_objective == "all":
            function = self._validation_loss or self.task_loss
            loss = loss + sum(function(logits, targets) for logits in outputs.exits)
        return loss

    def meta_parameters(self):
        return self.generator.parameters()


def _channels(method: str, network: nn.Module, channels: Sequence[int] | None) -> tuple[int, ...]:
    channels = getattr(network, "widths", None) if channels is None else channels
    if channels is None or len(channels) < 2:
        came = "does not tell them in `widths`" if channels is None else f"has {len(channels)}"
        raise ValueError(
            f"{method} needs channels, those of at least two stages' feature maps: a {type(network).__name__} {came}."
        )
    return tuple(channels)


def _classes(method: str, network: nn.Module, classes: int | None) -> int:
    if classes is None:
        linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError(
                f"{method} needs classes, the number of logits: a {type(network).__name__} has no linear layer to tell."
            )
        classes = linear[-1].out_features
    return classes
