"""The pieces of a training loop: an ordinary step, schedules of the learning rate, accuracy."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from kdfast.methods.base import Distiller
from kdfast.train import distributed

# Inputs and targets, perhaps with what the teacher says of the inputs.
Batch = (
    tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Any]
)  # inputs [batch, ...], targets [batch] class indices or [batch, classes] probabilities
Batches = Iterable[Batch]  # iterated once an epoch


def ordinary_step(distiller: Distiller, batch: Batch, optimizer: torch.optim.Optimizer) -> Tensor:
    """One step of the student with the meta-parameters as they are; returns the loss before it, detached."""
    return sum(accumulated_step(distiller, [batch], optimizer).values())


def accumulated_step(
    distiller: Distiller,
    group: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    autocast: AbstractContextManager | None = None,
    scaler: torch.amp.GradScaler | None = None,
    max_norm: float | None = None,
) -> dict[str, Tensor]:
    """One step on the mean loss of several batches, and of all processes; returns the loss parts before it, detached.

    Args:
        distiller: what is trained.
        group: the batches; their gradients are added up, so that memory holds one batch's activations.
        optimizer: of `distiller.inner_parameters()`.
        autocast: entered for each forward pass.
        scaler: of float16 training; the step is left out where it finds an overflow.
        max_norm: the gradient is clipped to this 2-norm.
    """
    optimizer.zero_grad(set_to_none=True)
    # Only what the optimizer holds: meta-parameters that are fixed here would gather gradients for nothing.
    trained = [p for held in optimizer.param_groups for p in held["params"] if p.requires_grad]
    totals: dict[str, Tensor] = {}
    for inputs, targets, *known in group:
        with autocast or nullcontext():
            outputs = distiller.student_outputs(inputs)
            teacher_outputs = known[0] if known else distiller.teacher_outputs(inputs)
            parts = distiller.losses(outputs, teacher_outputs, targets)
            loss = sum(parts.values()) / len(group)
        (loss if scaler is None else scaler.scale(loss)).backward(inputs=trained)
        for name, part in parts.items():
            part = part.detach() / len(group)
            totals[name] = totals[name] + part if name in totals else part
    distributed.average_gradients(trained)
    if max_norm is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, max_norm)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return totals


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: float = 0.0, end: float = 0.0) -> LRScheduler:
    """A schedule stepped after each step: the learning rate rises in a line, then falls along a cosine.

    Args:
        steps: of the whole training.
        warmup: share of the steps in which it rises, in [0, 1).
        end: what it falls to, as a share of its highest value.

    Source: the cosine is Loshchilov and Hutter's, "SGDR", ICLR 2017 (arXiv:1608.03983), without restarts.
    """
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rise_and_fall(step, steps, warmup, end))


def repeated_warmup_cosine(
    optimizer: torch.optim.Optimizer, lengths: Sequence[int], warmup: float = 0.0
) -> LRScheduler:
    """`warmup_cosine` anew in each phase of a training, whose phases take `lengths` steps."""

    def factor(step: int) -> float:
        begin = 0
        for length in lengths[:-1]:
            if step < begin + length:
                return _rise_and_fall(step - begin, length, warmup, 0.0)
            begin += length
        return _rise_and_fall(step - begin, lengths[-1], warmup, 0.0)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _rise_and_fall(step: int, steps: int, warmup: float, end: float) -> float:
    rising = warmup * steps
    if step + 1 < rising:
        return (step + 1) / rising
    return end + (1 - end) * (0.5 + 0.5 * math.cos(math.pi * max(step - rising, 0) / (steps - rising)))


def step_decay(optimizer: torch.optim.Optimizer, milestones: Sequence[int], factor: float = 0.1) -> LRScheduler:
    """A schedule stepped after each step: the learning rate is multiplied by `factor` at each of the `milestones`."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor ** sum(step >= at for at in milestones))


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Accuracy, in [0, 1], and mean cross-entropy of a classifier, in eval mode, which is undone.

    Args:
        model: returns logits [batch, classes].
        batches: their targets are class indices.

    Raises:
        ValueError: without images.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    right, loss, count = 0, 0.0, 0
    for inputs, targets in batches:
        logits = model(inputs)  # [batch, classes]
        right += (logits.argmax(1) == targets).sum()
        loss += nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        count += len(targets)
    for module, training in modes:
        module.training = training
    if not count:
        raise ValueError("evaluate needs at least one batch, got none.")
    return float(right) / count, float(loss) / count


def accuracy(
    distiller: Distiller,
    inputs: Tensor,  # [count, ...]
    targets: Tensor,  # [count], class indices
    batch_size: int = 1024,
) -> float:
    """Share of the inputs whose largest logit, of the student as it is exported, is the target's, in [0, 1]."""
    batches = zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
    return evaluate(distiller.export(), batches)[0]


@torch.no_grad()
def average(decay: float, averages: list[Tensor], values: list[Tensor], count: Tensor) -> None:
    """One update of the moving average, of tensors of one type; counters are taken over as they are."""
    if averages[0].is_floating_point():
        torch._foreach_lerp_(averages, values, 1 - decay)
    else:
        torch._foreach_copy_(averages, values)


def groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """So many batches at a time, fewer at the end."""
    batches = iter(batches)
    while group := list(itertools.islice(batches, size)):
        yield group


def undisturbed(batches: Batches) -> Iterator[Batch]:
    """The batches, without letting the start of their workers draw from the global random state."""
    state = torch.get_rng_state()
    iterator = iter(batches)
    torch.set_rng_state(state)
    yield from iterator


def endless(batches: Batches) -> Iterator[Batch]:
    """The batches, started anew whenever they end."""
    empty = 0
    while empty < 2:  # one that goes on from its end yields nothing once
        empty += 1
        for batch in undisturbed(batches):
            empty = 0
            yield batch
    raise ValueError("validation_batches must yield at least one batch, got none.")
