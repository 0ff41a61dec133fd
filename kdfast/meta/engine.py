"""MetaKD: steps of a student and of its meta-parameters, with everything a training wants around them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from kdfast.meta import checks, graphs, processes, tangents
from kdfast.meta import hypergradient as hyper
from kdfast.meta.inner import functional_step, update_slopes
from kdfast.meta.kinks import visible
from kdfast.meta.report import MetaStepReport, Totals
from kdfast.meta.shadow import RandomState, Shadow, forked
from kdfast.meta.tangents import Batch

COMMITS = ("reuse", "rehead", "separate")
VALIDATIONS = ("batch", "rolling")


class MetaKD:
    """Trains a student, and its meta-parameters on the validation loss its steps lead to.

    The student's step is bit for bit the ordinary one (zero_grad, forward, backward, `optimizer.step()`): its
    parameters, the optimizer's state, BatchNorm statistics and the random state end as that would leave them.
    The meta-parameters phi take a step of `meta_optimizer` along dL_val(theta+)/dphi, through one step theta+ of
    the student: never by double backward, but from the student's tangent along one direction, and the head's exact
    derivative there. With F a forward pass of the student, a backward counted as two and the head as nothing, a step
    costs 7 F as it stands ("forward", "reuse", "batch"), of which 3 F are the ordinary step's.

    Where several processes train together (torch.distributed), gradients are averaged over them here: the student must
    not be wrapped in DistributedDataParallel.

    Args:
        distiller: a `kdfast.methods.Distiller`, in train mode.
        optimizer: torch.optim SGD, Adam or AdamW of `distiller.inner_parameters()`, with any parameter groups.
        meta_optimizer: of `distiller.meta_parameters()`; any. On the CPU it takes no step when the update is
            skipped. On a GPU, where looking would mean waiting, it steps with a zero gradient: its own momentum or
            weight decay may then still move phi.
        tangent: where the student's tangent comes from. "forward": a difference from the training pass to one displaced
            pass, 1 F; "central": between two displaced passes, the papers', 2 F, needed in bfloat16 and float16;
            "jvp": forward-mode differentiation, exact, in the parameters' precision, about 4 F; "exact": double
            backward through everything, for checking. By default "forward", or "central" in 16 bits.
        commit: "reuse" takes the student's step first and learns phi from it, so the student sees phi one step
            later; "rehead" and "separate" try the step on a shadow, update phi, then take the step with the new phi,
            the papers' order: "rehead" from the same features (2 F more, the activations are kept meanwhile),
            "separate" anew (3 F more).
        validation: "batch": each step is given one held out from training; "rolling": the next training batch is that
            of this step, its forward pass serving both (1 F less). phi then learns at the start of the next step,
            before the student sees it. Needs commit="reuse".
        every: phi learns in every so many steps, the first of each; the others are ordinary.
        fraction: share of a training batch that the meta-gradient is taken on, in (0, 1]: what it costs beyond the
            validation pass shrinks with it. BatchNorm then takes the statistics of that share.
        radius: relative size of the displacement, > 0; by default chosen by `tangent` and precision.
        max_norm: the student's gradient is clipped to this 2-norm, as `torch.nn.utils.clip_grad_norm_` does.
        scaler: of float16 training; scales the losses here, and leaves out the student's step where it overflows.
        cuda_graph: run whole steps as CUDA graphs (kdfast/meta/graphs.py): the same launches without the host's time
            for them, where the network draws no random numbers. Adam needs capturable=True; a learning rate that
            changes in every step should be a tensor on the GPU, in SGD(fused=True) or a capturable Adam.

    Attributes:
        skipped: how many updates of phi were, a tensor on the student's device.

    Raises:
        ValueError, TypeError: one sentence saying what was expected and what came.

    Source: Deng et al., "DistPro", ECCV 2022 (arXiv:2204.05547), equations 4 and 5; Liu et al., "Meta Knowledge
    Distillation", 2022 (arXiv:2202.07940), algorithm 1; Liu et al., "MetaDistiller", ECCV 2020 (arXiv:2008.12094).

    Example:
        >>> engine = MetaKD(distiller, optimizer, meta_optimizer, validation="rolling")
        >>> for train_batch in loader:
        ...     report = engine.step(train_batch)
    """

    def __init__(
        self,
        distiller: nn.Module,
        optimizer: Optimizer,
        meta_optimizer: Optimizer,
        *,
        tangent: str | None = None,
        commit: str = "reuse",
        validation: str = "batch",
        every: int = 1,
        fraction: float = 1.0,
        radius: float | None = None,
        max_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        cuda_graph: bool = False,
    ):
        for name, value, allowed in (
            ("tangent", tangent, hyper.TANGENTS), ("commit", commit, COMMITS), ("validation", validation, VALIDATIONS),
        ):  # fmt: skip
            if value is not None:
                checks.choice(name, value, allowed)
        checks.options(commit, validation, every, fraction, radius, max_norm)
        self.distiller, self.optimizer, self.meta_optimizer = distiller, optimizer, meta_optimizer
        self._learned = [*distiller.inner_parameters(), *distiller.meta_parameters()]
        self._find_trained()
        self.tangent, self.commit, self.validation = tangent, commit, validation
        self.every, self.fraction, self.radius = every, fraction, radius
        self.max_norm, self.scaler = max_norm, scaler
        self.skipped = torch.zeros((), dtype=torch.int64, device=self._inner[0].device)
        self._devices = sorted({p.device.index for p in self._inner if p.is_cuda})
        self._steps = 0
        self._pending: hyper.Taken | None = None  # a step whose validation batch is the next training batch
        self._graphs: graphs.Graphs | None = None
        if cuda_graph:
            graphs.check(self._inner[0].device, validation, scaler, optimizer, meta_optimizer)
            self._graphs = graphs.Graphs(self._devices)

    @property
    def wants_validation(self) -> bool:
        """Whether the next `step` needs a validation batch."""
        return self.validation == "batch" and self._steps % self.every == 0

    @property
    def learns_first(self) -> bool:
        """Whether the student's step is taken with the meta-parameters as `step` leaves them, or as it finds them."""
        return self.commit != "reuse" or self.validation == "rolling"

    def step(
        self,
        train_batch: Batch | list[Batch],  # inputs [batch, ...], targets [batch]
        validation_batch: Batch | None = None,  # inputs [batch, ...], targets [batch]
        *,
        teacher_outputs: Any = None,
    ) -> MetaStepReport:
        """One step of the student, and where it is due one of the meta-parameters.

        Args:
            train_batch: (inputs, targets); or a list of such, whose gradients are accumulated into one step on their
                mean loss.
            validation_batch: (inputs, targets) held out from training, in the steps that want one.
            teacher_outputs: of the train inputs, where they are at hand (a list of them for a list); by default the
                teacher is asked.
        """
        batches, given = checks.train_batches(train_batch, teacher_outputs)
        if [p.requires_grad for p in self._learned] != self._trained:  # frozen or thawed meanwhile
            self._find_trained()
            self.forget()
            self._graphs = None if self._graphs is None else graphs.Graphs(self._devices)
        if self.wants_validation:
            checks.batch("validation_batch", validation_batch)
        if self._graphs is None:
            report = self._whole(batches, given, validation_batch)
        else:
            report = self._as_graph(batches, given, validation_batch)
        graphs.forget_casts(self._inner[0])
        self._steps += 1
        return report

    def _find_trained(self) -> None:
        self._inner, self._meta = checks.parameters(self.distiller, self.optimizer, self.meta_optimizer)
        self._trained = [p.requires_grad for p in self._learned]

    def _whole(self, batches, given, validation_batch) -> MetaStepReport:
        self.optimizer.zero_grad(set_to_none=True)
        self.meta_optimizer.zero_grad(set_to_none=True)
        taught = [
            self.distiller.teacher_outputs(batch[0]) if outputs is None else outputs
            for batch, outputs in zip(batches, given, strict=True)
        ]
        pairs = list(zip(batches, taught, strict=True))
        if self.validation == "rolling":
            return self._rolling(pairs)
        if not self.wants_validation:
            return self._ordinary(pairs)
        return (self._reuse if self.commit == "reuse" else self._try_first)(pairs, validation_batch)

    def _as_graph(self, batches, given, validation_batch) -> MetaStepReport:
        def step(*arguments):
            report = self._whole(*arguments)
            return report, [p.grad for p in (*self._inner, *self._meta)]

        learns, optimizers = self.wants_validation, (self.optimizer, self.meta_optimizer)
        report, gradients = self._graphs.run(
            step, learns, graphs.numbers_of(self.distiller, *optimizers), [optimizer.state for optimizer in optimizers],
            batches, given, validation_batch if learns else None,
        )  # fmt: skip
        for p, g in zip((*self._inner, *self._meta), gradients, strict=True):
            p.grad = g
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, report)

    def forget(self) -> None:
        """Drop the step whose validation a rolling engine waits for; for steps taken elsewhere meanwhile."""
        self._pending = None

    def state_dict(self) -> dict[str, Any]:
        """Where it stands among `every` steps, and how many updates were skipped; a rolling engine's last step is not
        kept, whose update is then missing after a resume."""
        return {"steps": self._steps, "skipped": self.skipped.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._steps, self._pending = int(state["steps"]), None
        self.skipped.copy_(state["skipped"])

    # ------------------------------------------------------------ the orders of a step
    def _ordinary(self, pairs) -> MetaStepReport:
        totals = Totals()
        for batch, taught in pairs:
            outputs = self.distiller.student_outputs(batch[0])
            parts = self.distiller.losses(outputs, taught, batch[1])
            self._backward(parts, len(pairs))
            totals.add(parts, len(pairs))
        self._update(slopes=False)
        return totals.report()

    def _reuse(self, pairs, validation_batch: Batch) -> MetaStepReport:
        shadow, theta = Shadow(self.distiller, self._inner), [p.detach().clone() for p in self._inner]
        totals, passes = Totals(), []
        for batch, taught in pairs:
            parts, kept = tangents.train_pass(self.distiller, batch, taught, self._devices, self._kinks())
            passes.append(kept)
            self._backward(parts, len(pairs))
            totals.add(parts, len(pairs))
        taken = self._update(shadow, passes, theta)
        with forked(self._devices):
            loss, v = self._validated(shadow, self._inner, validation_batch)
            found = self._learn(taken, v)
        return totals.report(loss, found)

    def _rolling(self, pairs) -> MetaStepReport:
        """The student's forward pass; phi learns from it what the last step did; then the head, and this step."""
        learns_next = (self._steps + 1) % self.every == 0
        shadow = theta = None
        if learns_next:
            shadow, theta = Shadow(self.distiller, self._inner), [p.detach().clone() for p in self._inner]
        kinks = learns_next and self._kinks()
        passed = [tangents.student_pass(self.distiller, batch[0], self._devices, kinks) for batch, _ in pairs]
        found = loss = None
        if self._pending is not None:
            with forked(self._devices):
                terms = zip(pairs, passed, strict=True)
                losses = [self.distiller.validation_loss(own.outputs, batch[1]) for (batch, _), own in terms]
                loss = sum(losses) / len(losses)
                shadowed = self._pending.shadow.again
                v = shadowed(self._inner, lambda _: self._gradient(loss, self._inner, retain_graph=True))
                loss, found = loss.detach(), self._learn(self._pending, v)
            self._pending = None
        totals, passes = Totals(), []
        for (batch, taught), own in zip(pairs, passed, strict=True):
            if learns_next:
                parts, kept = tangents.head_pass(self.distiller, own, batch, taught, self._devices)
                passes.append(kept)
            else:
                parts = self.distiller.losses(own.outputs, taught, batch[1])
            self._backward(parts, len(pairs))
            totals.add(parts, len(pairs))
        taken = self._update(shadow, passes, theta, slopes=learns_next)
        self._pending = taken if learns_next else None
        return totals.report(loss, found)

    def _try_first(self, pairs, validation_batch: Batch) -> MetaStepReport:
        """The step on a shadow, phi, then the real step: from the same features, or anew."""
        again, inner = self.commit == "separate", self._inner
        shadow, theta = Shadow(self.distiller, inner), [p.detach().clone() for p in inner]
        begin = RandomState(self._devices)
        passes, all_outputs, losses = [], [], []
        for batch, taught in pairs:
            if again:
                parts, kept = shadow.at(inner, tangents.train_pass, batch, taught, self._devices, self._kinks())
            else:
                own = tangents.student_pass(self.distiller, batch[0], self._devices, self._kinks())
                all_outputs.append(own.outputs)
                parts, kept = shadow.at(inner, tangents.head_pass, own, batch, taught, self._devices)
            passes.append(kept)
            losses.append(sum(parts.values()))
        mean = sum(losses) / len(losses)
        gradients = shadow.again(inner, lambda _: self._gradient(mean, inner, retain_graph=not again))
        factor = 1 / len(losses) if self.scaler is None else self._scale() / len(losses)
        clipped = None if self.max_norm is None else hyper.clip(gradients, self.max_norm)
        if clipped is not None:
            gradients = [None if g is None else g * clipped.factor for g in gradients]
        slopes = update_slopes(self.optimizer, inner, gradients)
        taken = hyper.Taken(shadow, passes, theta, gradients, slopes, factor, clipped)
        with torch.no_grad():
            stepped = functional_step(self.optimizer, inner, theta, gradients)
        with forked(self._devices):
            loss, v = self._validated(shadow, [x.requires_grad_() for x in stepped], validation_batch)
            found = self._learn(taken, v)
        if again:
            begin.replay()
            report = self._ordinary(pairs)
            return Totals(report.loss, report.parts).report(loss, found)
        totals = Totals()
        for (batch, taught), outputs, kept in zip(pairs, all_outputs, passes, strict=True):
            kept.head.replay()
            parts = self.distiller.losses(outputs, taught, batch[1])
            self._backward(parts, len(pairs))
            totals.add(parts, len(pairs))
        self._update(slopes=False)
        return totals.report(loss, found)

    # ------------------------------------------------------------ their pieces
    def _backward(self, parts: dict[str, Tensor], count: int) -> None:
        loss = sum(parts.values())
        loss = loss / count if count > 1 else loss
        (loss if self.scaler is None else self.scaler.scale(loss)).backward(inputs=self._inner)

    def _kinks(self) -> bool:
        """Whether the passes of a step from which a difference is taken hold its units."""
        if self.tangent not in (None, *hyper.DIFFERENCES):
            return False
        if self.tangent is not None and self.radius is None:
            hyper.default_radius(self.tangent, self._inner[0])  # raises, before anything has run, where there is none
        return visible(self.distiller)

    def _scale(self) -> Tensor:
        return self.scaler.scale(torch.ones((), device=self._inner[0].device))

    def _gradient(self, loss: Tensor, at: Sequence[Tensor], **options) -> list[Tensor | None]:
        """Of a loss, unscaled, of all processes."""
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        gradients = torch.autograd.grad(scaled, at, allow_unused=True, **options)
        if self.scaler is not None:
            torch._foreach_div_([g for g in gradients if g is not None], self._scale())
        return processes.average(gradients, at)

    def _update(self, shadow=None, passes=(), theta=None, slopes: bool = True) -> hyper.Taken | None:
        """The optimizer's step with the gradients that are there; what it was, where `slopes` are asked for."""
        inner, taken, clipped = self._inner, None, None
        for p, g in zip(inner, processes.average([p.grad for p in inner], inner), strict=True):
            p.grad = g
        factor = 1 / max(len(passes), 1)
        if self.scaler is not None:
            factor = self._scale() * factor
            self.scaler.unscale_(self.optimizer)
        if self.max_norm is not None:
            clipped = hyper.clip([p.grad for p in inner], self.max_norm)
            torch.nn.utils.clip_grads_with_norm_(inner, self.max_norm, clipped.norm)
        if slopes:
            gradients = [p.grad for p in inner]
            diagonal = update_slopes(self.optimizer, inner, gradients)
            taken = hyper.Taken(shadow, list(passes), theta, gradients, diagonal, factor, clipped)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        graphs.forget_casts(inner[0])
        return taken

    def _validated(self, shadow: Shadow, values: Sequence[Tensor], batch: Batch) -> tuple[Tensor, list[Tensor | None]]:
        """The validation loss at the stepped parameters, and its gradient v there."""

        def validated(distiller):  # backward inside: what is checkpointed runs again, there and not on the live student
            loss = hyper.validation_loss(distiller, batch)
            return loss.detach(), self._gradient(loss, values)

        return shadow.at(values, validated)

    def _learn(self, taken: hyper.Taken, v: Sequence[Tensor | None]) -> hyper.Hypergradient:
        """The meta-step along the meta-gradient of a step that was taken."""
        sixteen = hyper.sixteen_bits(self._inner, taken.passes)
        tangent = self.tangent or hyper.default_tangent(self._inner[0], sixteen)
        held = all(kept.path is not None for kept in taken.passes)
        radius = self.radius or hyper.default_radius(tangent, self._inner[0], held, sixteen)
        found = hyper.hypergradient(taken, v, self._meta, tangent, radius, self.fraction)
        for p, h in zip(self._meta, found.values, strict=True):
            p.grad = h
        self.skipped += ~found.usable
        if not found.usable.is_cpu or found.usable:
            self.meta_optimizer.step()
        return found
