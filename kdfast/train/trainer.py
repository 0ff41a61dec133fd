"""The trainer: a distiller, batches and an optimizer become a trained student, and go on where they were stopped."""

import copy
import math
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from kdfast.meta import MetaKD, Process
from kdfast.methods.base import Distiller
from kdfast.train import distributed
from kdfast.train.checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state
from kdfast.train.history import EpochRecord, History, StepRecord
from kdfast.train.loop import Batch, Batches, accumulated_step, average, endless, evaluate, groups, undisturbed
from kdfast.train.networks import to_channels_last
from kdfast.train.teacher_cache import TeacherCache

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Trains the student of a distiller, and its meta-parameters where a meta-optimizer is given.

    Args:
        distiller: what is trained, on its device. It is left in training mode; its teacher is kept in eval mode.
        batches: iterated once an epoch. To go on in the middle of an epoch they need `len()`, `state_dict()` and
            `load_state_dict()`, as the streams of `kdfast.data` have.
        optimizer: of `distiller.inner_parameters()`. A method's `lr_factor`, where it has one, multiplies its rates.
        epochs: passes over `batches`.
        scheduler: stepped after every *step*, not every epoch.
        validation_batches: with a meta-optimizer, what the meta-parameters learn on, a batch a step, started anew
            whenever they end (a rolling ``meta`` needs none). Without one, held-out images: measured after each
            epoch, and told to the method.
        meta_optimizer: of `distiller.meta_parameters()`. They learn in the epochs in which the method says so (its
            `meta_active`, where it has one); in the others the steps are ordinary.
        meta: options of `kdfast.MetaKD`, such as ``{"validation": "rolling"}`` or ``{"every": 5}``.
        halves: for each epoch with meta-steps gives (batches, validation_batches) to take in place of those above;
            called with the epoch's number, once more where the training goes on inside that epoch.
        evaluation: batches the exported student's accuracy is measured on.
        evaluate_every: epochs between two evaluations; the last epoch is always evaluated.
        precision: "fp32", or autocast to "bf16" or "fp16"; the latter scales the loss.
        accumulate: batches a step; their gradients are added up.
        ema: decay of an exponential moving average of the student, which is then what is evaluated and exported.
        channels_last: memory layout of the networks and the images.
        compile: compile student and teacher with `torch.compile`.
        process: where a DistPro search records the weights that each step of the student is taken with.
        teacher_cache: where the teacher's outputs for `batches`, a stream of `kdfast.data`, are kept.
        callback: called after every step, to show progress or to record what the method learns.
        on_epoch: called after every epoch, before its checkpoint.
        checkpoint: file written after every epoch, by the first process.
        checkpoint_every: steps between two checkpoints inside an epoch.

    Attributes:
        step, epoch: done so far.
        history: a record of each epoch.

    Raises:
        ValueError: for arguments that do not go together; one sentence.
        FloatingPointError: by `run`, after an epoch whose loss was not finite; its checkpoint is not written.

    Example:
        >>> optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1, momentum=0.9)
        >>> trainer = Trainer(distiller, streams.train, optimizer, epochs=10, evaluation=streams.test)
        >>> trainer.run().last.accuracy
    """

    def __init__(
        self,
        distiller: Distiller,
        batches: Batches,
        optimizer: torch.optim.Optimizer,
        *,
        epochs: int,
        scheduler: LRScheduler | None = None,
        validation_batches: Batches | None = None,
        meta_optimizer: torch.optim.Optimizer | None = None,
        meta: dict[str, Any] | None = None,
        halves: Callable[[int], tuple[Batches, Batches]] | None = None,
        evaluation: Batches | None = None,
        evaluate_every: int = 1,
        precision: str = "fp32",
        accumulate: int = 1,
        ema: float | None = None,
        channels_last: bool = False,
        compile: bool = False,
        process: Process | None = None,
        teacher_cache: TeacherCache | None = None,
        callback: Callable[[StepRecord], None] | None = None,
        on_epoch: Callable[[EpochRecord], None] | None = None,
        checkpoint: Path | None = None,
        checkpoint_every: int | None = None,
    ):
        learns = meta_optimizer is not None
        rolling = (meta or {}).get("validation") == "rolling"
        if learns and validation_batches is None and halves is None and not rolling:
            raise ValueError("To learn meta-parameters a Trainer needs validation_batches beside the meta_optimizer.")
        if learns and next(distiller.meta_parameters(), None) is None:
            raise ValueError(f"{type(distiller).__name__} has no meta-parameters; leave out the meta_optimizer.")
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}.")
        if meta and not learns:
            raise ValueError("meta is of a meta_optimizer, got none; give one, or leave meta out.")
        for name, value in (("epochs", epochs), ("evaluate_every", evaluate_every)):
            if value < 1:
                raise ValueError(f"{name} must be a number of epochs of at least 1, got {value}.")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held.isdisjoint(map(id, distiller.inner_parameters())):
            raise ValueError(
                f"The optimizer holds none of {type(distiller).__name__}'s parameters, so that nothing would be "
                "trained; build it from distiller.inner_parameters()."
            )
        if accumulate < 1:
            raise ValueError(f"accumulate must be a number of batches of at least 1, got {accumulate}.")
        if ema is not None and not 0 < ema < 1:
            raise ValueError(f"ema must be a decay in (0, 1), got {ema}.")
        if checkpoint_every is not None and not hasattr(batches, "state_dict"):
            raise ValueError("checkpoint_every needs batches with a state_dict(); without one, an epoch starts anew.")
        self.distiller, self.batches, self.optimizer, self.epochs = distiller, batches, optimizer, epochs
        self.scheduler, self.validation_batches = scheduler, validation_batches
        self.meta_optimizer, self.halves = meta_optimizer, halves
        self.evaluation, self.evaluate_every = evaluation, evaluate_every
        self.accumulate, self.channels_last, self.process = accumulate, channels_last, process
        self.callback, self.on_epoch, self.teacher_cache = callback, on_epoch, teacher_cache
        self.checkpoint, self.checkpoint_every = checkpoint, checkpoint_every
        self.step = self.epoch = 0
        self.history = History()
        self._sums: dict[str, Tensor] = {}  # of the loss parts in this epoch
        self._epoch_steps, self._waited = 0, 0.0
        self._validation: Iterator[Batch] | None = None
        self._halves: dict[str, Batches] = {}  # while an epoch on them runs
        self._resumed: dict[str, Any] | None = None  # a state inside an epoch, to be entered with the epoch

        self.device = next(distiller.parameters()).device
        self._dtype = PRECISIONS[precision]
        self._scaler = torch.amp.GradScaler(self.device.type) if precision == "fp16" else None
        self._engine = None
        if learns:
            self._engine = MetaKD(distiller, optimizer, meta_optimizer, scaler=self._scaler, **(meta or {}))
        if channels_last:
            to_channels_last(distiller)  # and with it its teacher, of which no gradient is taken
        distributed.same_everywhere(distiller)
        self._ema = None
        if ema is not None:
            self._ema = AveragedModel(distiller.export(), multi_avg_fn=partial(average, ema), use_buffers=True)
        if compile:
            for network in filter(None, (distiller.student, distiller.teacher)):
                network.compile()

    @property
    def student(self) -> nn.Module:
        """What is evaluated and exported: the bare student, or its moving average."""
        return self.distiller.export() if self._ema is None else self._ema.module

    def run(self) -> History:
        """Train from where it stands to the last epoch."""
        while self.epoch < self.epochs:
            self._run_epoch()
        return self.history

    def _run_epoch(self) -> None:
        self.distiller.train()
        if self.distiller.teacher is not None:
            self.distiller.teacher.requires_grad_(False).eval()  # whatever someone did to it in between
        self.distiller.start_epoch(self.epoch, self.epochs)
        learns = self.meta_optimizer is not None and getattr(self.distiller, "meta_active", True)
        batches, validation_batches = self.batches, self.validation_batches
        if learns and self.halves is not None:
            batches, validation_batches = self.halves(self.epoch)
            self._halves = {"first half": batches, "second half": validation_batches}
            self._validation = None
        if self._resumed is not None:  # once more what this epoch's start has changed
            self._restore(self._resumed)
            self._resumed = None
        if learns and self._validation is None and self._engine.validation == "batch":
            self._validation = endless(validation_batches)
        if self._engine is not None and not learns:
            self._engine.forget()
        start, images, self._waited = time.perf_counter(), 0, 0.0
        for group in groups(self._prepared(batches), self.accumulate):
            record = self._run_step(group, learns)
            images += record.images
            if self.callback is not None:
                self.callback(record)
            due = self.checkpoint_every and self.step % self.checkpoint_every == 0
            if due and self._epoch_steps * self.accumulate < len(batches):  # else the epoch's end saves
                self.save()
        if not self._epoch_steps:
            raise ValueError("A Trainer needs at least one batch an epoch, got none.")
        self._end_epoch(time.perf_counter() - start, images)

    def _run_step(self, group: list[Batch], learns: bool) -> StepRecord:
        wanted = learns and self._engine.wants_validation
        validation_batch = self._moved(self._next(self._validation)) if wanted else None
        self.distiller.start_step(self.step)
        if not (learns and self._engine.learns_first):
            self._record_weights()
        rates = [held["lr"] for held in self.optimizer.param_groups]
        if (factor := getattr(self.distiller, "lr_factor", 1.0)) != 1:
            for held in self.optimizer.param_groups:
                held["lr"] = held["lr"] * factor  # a tensor is the schedule's own
        start = time.perf_counter()
        if learns:
            known = [outputs[0] for _, _, *outputs in group if outputs] or None
            with self._autocast():
                pairs = [(inputs, targets) for inputs, targets, *_ in group]
                parts = self._engine.step(pairs, validation_batch, teacher_outputs=known).parts
            if self._engine.learns_first:
                self._record_weights()
        else:
            parts = accumulated_step(
                self.distiller, group, self.optimizer, autocast=self._autocast(), scaler=self._scaler,
                max_norm=None if self._engine is None else self._engine.max_norm,
            )  # fmt: skip
        seconds = time.perf_counter() - start
        for held, rate in zip(self.optimizer.param_groups, rates, strict=True):
            held["lr"] = rate  # the schedule's, which may build on it
        if self._ema is not None:
            self._ema.update_parameters(self.distiller.export())
        if self.scheduler is not None:
            self.scheduler.step()
        for name, part in parts.items():
            self._sums[name] = self._sums[name] + part if name in self._sums else part.clone()
        images = distributed.world_size() * sum(len(inputs) for inputs, *_ in group)
        record = StepRecord(self.step, self.epoch, parts, seconds, images, learns)
        self.step += 1
        self._epoch_steps += 1
        return record

    def _record_weights(self) -> None:
        if self.process is not None:
            self.process.record(self.distiller.weights(), self.distiller.weights.raw)

    def _end_epoch(self, seconds: float, images: int) -> None:
        parts = {name: float(total) / self._epoch_steps for name, total in self._sums.items()}
        if not math.isfinite(sum(parts.values())):
            named = ", ".join(f"{name} {value:.3g}" for name, value in parts.items())
            raise FloatingPointError(
                f"The loss of epoch {self.epoch} is not finite ({named}); lower the learning rate, or look at the data."
            )
        distributed.same_everywhere(self.distiller, buffers_only=True)
        measure = self.epoch + 1 == self.epochs or (self.epoch + 1) % self.evaluate_every == 0
        accuracy = validation_accuracy = validation_loss = None
        if measure and self.evaluation is not None:
            accuracy, _ = self._evaluate(self.evaluation)
        if self.meta_optimizer is None and self.validation_batches is not None:
            validation_accuracy, validation_loss = self._evaluate(self.validation_batches)
        rate = float(self.optimizer.param_groups[0]["lr"]) * getattr(self.distiller, "lr_factor", 1.0)
        self.distiller.end_epoch(validation_loss)  # which may change the factor
        record = EpochRecord(
            epoch=self.epoch,
            steps=self.step,
            parts=parts,
            lr=rate,
            accuracy=accuracy,
            validation_accuracy=validation_accuracy,
            validation_loss=validation_loss,
            seconds=seconds,
            images_per_second=images / seconds,
            waiting=self._waited / seconds,
        )
        self.history.epochs.append(record)
        self._sums, self._epoch_steps, self._halves = {}, 0, {}
        self.epoch += 1
        if self.on_epoch is not None:
            self.on_epoch(record)
        self.save()

    def _evaluate(self, batches: Batches) -> tuple[float, float]:
        with self._autocast():
            return evaluate(self.student, map(self._moved, undisturbed(batches)))

    def _autocast(self) -> AbstractContextManager:
        return nullcontext() if self._dtype is None else torch.autocast(self.device.type, self._dtype)

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch, None at the end; the time it takes is noted."""
        start = time.perf_counter()
        batch = next(batches, None)
        self._waited += time.perf_counter() - start
        return batch

    def _prepared(self, batches: Batches) -> Iterator[Batch]:
        """The batches, each with the teacher's outputs where those are cached: the stream knows it until the next."""
        iterator = undisturbed(batches)
        while (batch := self._next(iterator)) is not None:
            batch = self._moved(batch)
            with self._autocast():
                cached = () if self.teacher_cache is None else (self.teacher_cache.outputs(batches, batch[0]),)
            yield *batch, *cached

    def _moved(self, batch: Batch) -> Batch:
        if self.channels_last:
            return batch[0].to(memory_format=torch.channels_last), batch[1]
        return batch

    def _streams(self) -> dict[str, Batches]:
        """What has a position to be continued from."""
        streams = {"train": self.batches, **self._halves}
        if self.meta_optimizer is not None and self.validation_batches is not None:
            streams["validation"] = self.validation_batches
        return {name: stream for name, stream in streams.items() if hasattr(stream, "state_dict")}

    def _parts(self) -> dict[str, Any]:
        """What has a `state_dict` of its own, by its name in a checkpoint; None where it is not used."""
        return {
            "distiller": self.distiller,
            "optimizer": self.optimizer,
            "meta_optimizer": self.meta_optimizer,
            "meta": self._engine,
            "scheduler": self.scheduler,
            "scaler": self._scaler,
            "ema": self._ema,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything the training depends on; of what is each process's own, all processes'."""
        own = {
            "streams": {name: stream.state_dict() for name, stream in self._streams().items()},
            "random": random_state(),
        }
        return {
            "step": self.step,
            "epoch": self.epoch,
            "epoch_steps": self._epoch_steps,
            "sums": self._sums,
            "history": [asdict(record) for record in self.history.epochs],
            **{name: None if part is None else part.state_dict() for name, part in self._parts().items()},
            "process": None if self.process is None else {"weights": self.process.weights, "raw": self.process.raw},
            "processes": distributed.gathered(own),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where the trainer of `state_dict` stood; it was built as this one was.

        Raises:
            ValueError: where it was built otherwise.
        """
        parts = {**self._parts(), "process": self.process}
        for name, part in parts.items():
            if (part is None) != (state.get(name) is None):
                there, here = ("with", "without")[:: 1 if part is None else -1]
                raise ValueError(
                    f"The checkpoint is of a training {there} a {name}, this one is {here}; build them alike."
                )
        if len(state["processes"]) != distributed.world_size():
            raise ValueError(
                f"The checkpoint is of {len(state['processes'])} process(es), here are {distributed.world_size()}; "
                "resume with as many."
            )
        self.step, self.epoch, self._epoch_steps = state["step"], state["epoch"], state["epoch_steps"]
        self.history = History([EpochRecord(**record) for record in state["history"]])
        self._restore(state)
        if self._epoch_steps:
            self._resumed = state

    def _restore(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            try:
                if part is not None:
                    part.load_state_dict(copy.deepcopy(state[name]))
            except (RuntimeError, ValueError) as error:  # PyTorch's long list of keys and shapes
                first = textwrap.shorten(str(error).strip().split("\n")[-1], 200, placeholder=" ...")
                raise ValueError(
                    f"The checkpoint's {name} is another training's ({first}); build them alike."
                ) from error
        self._sums = {name: total.to(self.device) for name, total in state["sums"].items()}
        if self.process is not None:
            self.process = Process(self.process.pathways)
            for weights, raw in zip(state["process"]["weights"], state["process"]["raw"], strict=True):
                self.process.record(weights, raw)
        own = state["processes"][distributed.rank()]
        for name, stream in self._streams().items():
            if name in own["streams"]:  # the halves only once their epoch has begun
                stream.load_state_dict(own["streams"][name])
        set_random_state(own["random"])

    def save(self) -> None:
        """Write the checkpoint, where one was asked for."""
        if self.checkpoint is not None:
            distributed.same_everywhere(self.distiller, buffers_only=True)
            state = self.state_dict()
            if distributed.rank() == 0:
                save_checkpoint(self.checkpoint, state)

    def resume(self, path: Path) -> None:
        """`load_state_dict` of a checkpoint file."""
        self.load_state_dict(load_checkpoint(path))
