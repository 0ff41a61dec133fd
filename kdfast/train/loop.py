"""The training loop: one distiller, batches from memory, an optimizer; everything else is the caller's."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from kdfast.meta import meta_kd_step
from kdfast.methods.base import Distiller

Batches = Iterable[tuple[Tensor, Tensor]]  # of (inputs [batch, ...], targets [batch]); iterated once an epoch


@dataclass(frozen=True)
class StepRecord:
    """What one step did.

    Attributes:
        step, epoch: both count from 0.
        loss: the training loss before the step.
        seconds: duration of the step alone (forward, backward, update), without data and evaluation.
    """

    step: int
    epoch: int
    loss: float
    seconds: float


@dataclass
class History:
    """What a training went through.

    Attributes:
        steps: a record each.
        accuracy: (steps done, share of the evaluation set that is right) at each evaluation.
    """

    steps: list[StepRecord] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)


def fit(
    distiller: Distiller,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    scheduler: LRScheduler | None = None,
    validation_batches: Batches | None = None,
    meta_optimizer: torch.optim.Optimizer | None = None,
    meta_step: Callable = meta_kd_step,
    evaluation: tuple[Tensor, Tensor] | None = None,
    evaluate_every: int = 1,
    callback: Callable[[StepRecord], None] | None = None,
) -> History:
    """Train the student of `distiller`, and its meta-parameters where a meta-optimizer is given.

    Args:
        distiller: what is trained. It is left in training mode.
        batches: iterated once an epoch.
        optimizer: of `distiller.inner_parameters()`.
        epochs: passes over `batches`.
        scheduler: stepped after every *step*, not every epoch.
        validation_batches: what the meta-parameters are learned on, a batch a step; started anew whenever they end.
        meta_optimizer: of `distiller.meta_parameters()`.
        meta_step: `kdfast.meta_kd_step`, or a partial of it with other options.
        evaluation: inputs ``[count, ...]`` and class indices ``[count]`` on which the accuracy is measured.
        evaluate_every: epochs between two evaluations; the last epoch is always evaluated.
        callback: called after every step, to show progress or to record what the method learns.

    Returns:
        The record of each step and the accuracies.

    Raises:
        ValueError: when only one of `validation_batches` and `meta_optimizer` is given, when they are given for a
            method without meta-parameters, or when there are no batches.

    Example:
        >>> optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1, momentum=0.9)
        >>> history = fit(distiller, loader, optimizer, epochs=10, evaluation=test)
        >>> steps, accuracy = history.accuracy[-1]
    """
    learns = meta_optimizer is not None
    if learns != (validation_batches is not None):
        given, missing = ("meta_optimizer", "validation_batches")[:: 1 if learns else -1]
        raise ValueError(f"To learn meta-parameters fit needs {missing} beside the {given} it was given.")
    if learns and next(distiller.meta_parameters(), None) is None:
        raise ValueError(f"{type(distiller).__name__} has no meta-parameters; leave out the meta_optimizer.")
    validation = _endless(validation_batches) if learns else None
    history = History()
    for epoch in range(epochs):
        distiller.train()
        for inputs, targets in batches:
            validation_batch = next(validation) if learns else None
            start = time.perf_counter()
            if learns:
                loss = meta_step(distiller, (inputs, targets), validation_batch, optimizer, meta_optimizer).loss
            else:
                loss = ordinary_step(distiller, (inputs, targets), optimizer)
            loss = float(loss)  # waits for the device, so that the time measured is the step's
            record = StepRecord(len(history.steps), epoch, loss, time.perf_counter() - start)
            if scheduler is not None:
                scheduler.step()
            history.steps.append(record)
            if callback is not None:
                callback(record)
        if not history.steps:
            raise ValueError("fit needs at least one batch an epoch, got none.")
        if evaluation is not None and ((epoch + 1) % evaluate_every == 0 or epoch + 1 == epochs):
            history.accuracy.append((len(history.steps), accuracy(distiller, *evaluation)))
    return history


def ordinary_step(
    distiller: Distiller,
    batch: tuple[Tensor, Tensor],  # inputs [batch, ...], targets [batch]
    optimizer: torch.optim.Optimizer,
) -> Tensor:
    """One step of the student with the meta-parameters as they are; returns the loss before it, detached."""
    inputs, targets = batch
    optimizer.zero_grad(set_to_none=True)
    parts = distiller.losses(distiller.student_outputs(inputs), distiller.teacher_outputs(inputs), targets)
    loss = sum(parts.values())
    # Only what the optimizer holds: meta-parameters that are fixed here would gather gradients for nothing.
    loss.backward(inputs=[p for group in optimizer.param_groups for p in group["params"] if p.requires_grad])
    optimizer.step()
    return loss.detach()


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: float = 0.0) -> LRScheduler:
    """A schedule stepped after each step: the learning rate rises in a line, then falls to 0 along a cosine.

    Args:
        steps: of the whole training.
        warmup: share of the steps in which it rises, in [0, 1).

    Source: the cosine is Loshchilov and Hutter's, "SGDR", ICLR 2017 (arXiv:1608.03983), without restarts.
    """
    rising = warmup * steps

    def factor(step: int) -> float:
        if step + 1 < rising:
            return (step + 1) / rising
        return 0.5 + 0.5 * math.cos(math.pi * max(step - rising, 0) / (steps - rising))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def accuracy(
    distiller: Distiller,
    inputs: Tensor,  # [count, ...]
    targets: Tensor,  # [count], class indices
    batch_size: int = 1024,
) -> float:
    """Share of the inputs whose largest logit is the target's, in [0, 1]; measured in eval mode, which is undone."""
    training = distiller.training
    distiller.eval()
    right = 0
    for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        logits = distiller.logits(distiller.student_outputs(x))  # [batch, classes]
        right += int((logits.argmax(1) == y).sum())
    distiller.train(training)
    return right / len(targets)


def _endless(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("validation_batches must yield at least one batch, got none.")
