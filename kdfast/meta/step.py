"""meta_kd_step: one step of the student and one of the meta-parameters."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kdfast.meta import hypergradient as hyper
from kdfast.meta.inner import check_optimizer, functional_step, update_slopes

COMMITS = ("reuse", "separate")


class MetaStepReport(NamedTuple):
    """What a step did: detached scalar tensors on the student's device, not yet waited for.

    Attributes:
        loss: the training loss the student's step was taken on, before it.
        parts: its named parts.
        validation_loss: at the student's stepped parameters, before the meta-step.
        meta_gradient_norm: 2-norm of d validation_loss / d meta-parameters, all of them together.
        epsilon: factor of the displacement along w (docs/math/hypergradient.md).
        tangent_error: relative error of the same finite difference where the answer is known, the training loss
            along w; about that of the meta-gradient. NaN in a skipped update on the CPU.
        skipped: bool; the meta-gradient was zero along all of the student, or not finite, and zero is in its place.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    validation_loss: Tensor
    meta_gradient_norm: Tensor
    epsilon: Tensor
    tangent_error: Tensor
    skipped: Tensor


def meta_kd_step(
    distiller: nn.Module,
    train_batch: tuple[Any, Tensor],  # inputs [batch, ...], targets [batch]
    validation_batch: tuple[Any, Tensor],  # inputs [batch, ...], targets [batch]
    optimizer: Optimizer,
    meta_optimizer: Optimizer,
    *,
    tangent: str = "forward",
    commit: str = "reuse",
    radius: float | None = None,
    teacher_outputs: Any = None,
) -> MetaStepReport:
    """Train the student one step, and its meta-parameters on the validation loss which that step leads to.

    The student's step is bit for bit the ordinary one (zero_grad, forward, backward, `optimizer.step()`): its
    parameters, the optimizer's state, BatchNorm statistics and the random state end as that would leave them.
    The meta-parameters phi take a step of `meta_optimizer` along dL_val(theta+)/dphi, through one step theta+ of
    the student, computed without double backward: as the difference of the head's gradient between the student
    and a displaced copy of it.

    Args:
        distiller: a `kdfast.methods.Distiller`, in train mode. Where its `losses` detaches the student's outputs,
            a difference sees through that: keep what is constant in `teacher_outputs`.
        train_batch: (inputs, targets) of the student's step.
        validation_batch: (inputs, targets) held out from training.
        optimizer: torch.optim SGD, Adam or AdamW of `distiller.inner_parameters()`, with any parameter groups.
        meta_optimizer: of `distiller.meta_parameters()`; any. On the CPU it takes no step when the update is
            skipped. On a GPU, where looking would mean waiting, it steps with a zero gradient: its own momentum or
            weight decay may then still move phi.
        tangent: "forward" displaces the student once and reuses the train pass; "central" displaces it both ways,
            as in the papers: one more forward, and needed in bfloat16.
        commit: "reuse" takes the student's step first and learns phi from it, so the student sees phi one step
            later; "separate" tries the step on a shadow, updates phi, then takes the step with the new phi, the
            papers' order, for one more forward and backward.
        radius: relative size of the displacement, > 0; by default chosen by `tangent` and precision.
        teacher_outputs: of the train inputs, where they are at hand; by default the teacher is asked.

    Returns:
        MetaStepReport.

    Raises:
        ValueError, TypeError: one sentence saying what was expected and what came.

    Source: Deng et al., "DistPro", ECCV 2022 (arXiv:2204.05547), equations 4 and 5; Liu et al., "Meta Knowledge
    Distillation", 2022 (arXiv:2202.07940), algorithm 1.

    Example:
        >>> optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.05, momentum=0.9)
        >>> meta_optimizer = torch.optim.AdamW(distiller.meta_parameters(), lr=3e-4)
        >>> report = meta_kd_step(distiller, (x, y), (x_val, y_val), optimizer, meta_optimizer)
        >>> report.validation_loss, report.tangent_error
    """
    _check_choice("tangent", tangent, hyper.TANGENTS)
    _check_choice("commit", commit, COMMITS)
    _check_batch("train_batch", train_batch)
    _check_batch("validation_batch", validation_batch)
    inner, meta = _parameters(distiller, optimizer, meta_optimizer)
    if radius is None:
        radius = hyper.default_radius(tangent, inner[0])
    elif not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}; leave it out for the default.")

    optimizer.zero_grad(set_to_none=True)
    meta_optimizer.zero_grad(set_to_none=True)
    if teacher_outputs is None:
        teacher_outputs = distiller.teacher_outputs(train_batch[0])
    shadow = hyper.Shadow(distiller, inner)
    theta = [p.detach().clone() for p in inner]

    if commit == "reuse":
        parts, base, gradients, slopes = _step(distiller, train_batch, teacher_outputs, optimizer, inner, meta)
        stepped = inner
    else:
        parts = shadow.at(inner, hyper.train_parts, train_batch, teacher_outputs)
        loss = sum(parts.values())
        gradients = torch.autograd.grad(loss, inner + meta, allow_unused=True)
        base, gradients = (loss.detach(), gradients[len(inner) :]), gradients[: len(inner)]
        slopes = update_slopes(optimizer, inner, gradients)
        with torch.no_grad():
            stepped = functional_step(optimizer, inner, theta, gradients)
        stepped = [x.requires_grad_() for x in stepped]

    with torch.random.fork_rng(shadow.devices):
        validation_loss = shadow.at(stepped, hyper.validation_loss, validation_batch)
        v = torch.autograd.grad(validation_loss, stepped, allow_unused=True)
        along = hyper.direction(theta, gradients, slopes, v, radius, both=tangent == "central")
        result = hyper.tangent_of_head(
            shadow, along, meta, train_batch, teacher_outputs, base if tangent == "forward" else None
        )
    for p, h in zip(meta, result.meta_gradient, strict=True):
        p.grad = h
    if not result.usable.is_cpu or result.usable:
        meta_optimizer.step()

    if commit == "separate":
        shadow.replay()
        parts, base, _, _ = _step(distiller, train_batch, teacher_outputs, optimizer, inner, [])
    return MetaStepReport(
        loss=base[0],
        parts={name: part.detach() for name, part in parts.items()},
        validation_loss=validation_loss.detach(),
        meta_gradient_norm=torch.stack([h.norm() for h in result.meta_gradient]).norm(),
        epsilon=along.epsilon,
        tangent_error=result.tangent_error,
        skipped=~result.usable,
    )


def _step(distiller, batch, teacher_outputs, optimizer, inner, meta):
    """The ordinary step, also keeping the head's gradient in `meta` and how the step depends on its gradient."""
    parts = hyper.train_parts(distiller, batch, teacher_outputs)
    loss = sum(parts.values())
    loss.backward(inputs=inner + meta)
    gradients = [p.grad for p in inner]
    meta_gradients = [p.grad for p in meta]
    slopes = update_slopes(optimizer, inner, gradients) if meta else None
    optimizer.step()
    if torch.is_autocast_enabled(inner[0].device.type):
        torch.clear_autocast_cache()  # it holds the weights of before the step
    return parts, (loss.detach(), meta_gradients), gradients, slopes


def _parameters(distiller, optimizer, meta_optimizer) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable inner and meta-parameters, each held by its own optimizer only."""
    check_optimizer(optimizer)
    name = type(distiller).__name__
    inner = [p for p in distiller.inner_parameters() if p.requires_grad]
    meta = [p for p in distiller.meta_parameters() if p.requires_grad]
    if not meta:
        raise ValueError(
            f"{name} has no meta-parameters to learn; train it with an ordinary step, or yield them in "
            "meta_parameters()."
        )
    held, held_meta = _held(optimizer), _held(meta_optimizer)
    shared = sum(id(p) in held for p in meta)
    if shared:
        raise ValueError(
            f"{shared} of {name}'s {len(meta)} meta-parameters are also in the student's optimizer; build that from "
            "distiller.inner_parameters()."
        )
    missing = sum(id(p) not in held for p in inner)
    if missing:
        raise ValueError(
            f"{missing} of {name}'s {len(inner)} trainable inner parameters are not in the optimizer; build it from "
            "distiller.inner_parameters(), or freeze them with requires_grad_(False)."
        )
    missing = sum(id(p) not in held_meta for p in meta)
    if missing:
        raise ValueError(
            f"{missing} of {name}'s {len(meta)} meta-parameters are not in the meta_optimizer; build it from "
            "distiller.meta_parameters()."
        )
    return inner, meta


def _held(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def _check_batch(name: str, batch: Any) -> None:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        came = f"{len(batch)} items" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise TypeError(f"{name} must be a pair (inputs, targets), got {came}.")
