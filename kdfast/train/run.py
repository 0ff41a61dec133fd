"""A training from its settings: what `kdfast train` does, and the folder it leaves.

RUN/settings.json            every number of it
RUN/checkpoint.safetensors   where it stands
RUN/best.safetensors         the student of the best epoch
RUN/last.safetensors         the student of the last one
RUN/results.json             both, and every epoch
RUN/process.safetensors      what a DistPro search found
RUN/tensorboard/             curves
"""

import inspect
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from kdfast.data import Stream, Streams, loaders
from kdfast.data.streams import usable
from kdfast.meta import Process
from kdfast.methods import METHODS, Distiller
from kdfast.models import Tapped
from kdfast.train import distributed
from kdfast.train.checkpoint import seed_everything
from kdfast.train.files import atomically, write_json
from kdfast.train.history import EpochRecord, StepRecord
from kdfast.train.loop import step_decay, warmup_cosine
from kdfast.train.networks import bare_name, network_of, write_student
from kdfast.train.recipes import Recipe, check_options
from kdfast.train.teacher_cache import TeacherCache, in_bytes
from kdfast.train.trainer import Trainer

CHECKPOINT, SETTINGS, RESULTS, PROCESS = (
    "checkpoint.safetensors", "settings.json", "results.json", "process.safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Everything a training depends on.

    Attributes:
        data: see `kdfast.data.loaders`.
        student, teacher: see `kdfast.train.networks.network_of`; a method without a teacher has None.
        student_layers, teacher_layers: names of the layers whose outputs are their features, by commas, for networks
            that do not return features themselves; see `kdfast.models.Tapped`.
        process: file of a DistPro process to follow, None to search.
        precision, accumulate, ema, channels_last, compile, checkpoint_every: see `Trainer`.
        evaluate_every: epochs.
        loader, size, variants, workers, download, on_broken, broken_limit: see `kdfast.data.loaders`.
        cache_teacher: folder of the teacher's outputs, see `TeacherCache`; None to ask the teacher each time.
    """

    recipe: Recipe
    data: str
    student: str
    teacher: str | None = None
    student_layers: str | None = None
    teacher_layers: str | None = None
    seed: int = 0
    device: str = "cpu"
    precision: str = "fp32"
    accumulate: int = 1
    ema: float | None = None
    channels_last: bool = False
    compile: bool = False
    process: str | None = None
    loader: str = "auto"
    size: int | None = None
    variants: int | None = None
    workers: int | None = None
    download: bool = False
    on_broken: str = "stop"
    broken_limit: int = 100
    cache_teacher: str | None = None
    evaluate_every: int = 1
    checkpoint_every: int | None = None

    def save(self, folder: Path) -> Path:
        return write_json(folder / SETTINGS, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Settings":
        """Raises: ValueError where the folder holds no training, or an edited one; one sentence."""
        path = folder / SETTINGS
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**values, "recipe": Recipe.of(values["recipe"])})
        except FileNotFoundError as error:
            raise ValueError(f"{folder} must be a folder of kdfast train, but it has no {SETTINGS}.") from error
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} was cut short, edited, or written by another version of kdfast ({error}); use another copy, "
                "or that version."
            ) from error


class Run:
    """A training of `Settings` in a folder: built, and continued where there is a checkpoint.

    Args:
        settings: what to train.
        folder: where its files go; it exists.
        callback, on_epoch: see `Trainer`; called in every process.
        say: told what is worth knowing before the training begins, in the first process.

    Attributes:
        trainer, distiller, streams: what the settings became.
        steps: of the whole training.

    Raises:
        ValueError: for settings that do not go together, and for unusable files; one sentence.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        callback: Callable[[StepRecord], None] = lambda record: None,
        on_epoch: Callable[[EpochRecord], None] = lambda record: None,
        say: Callable[[str], None] = lambda text: None,
    ):
        recipe = settings.recipe
        self.settings, self.folder, self._told = settings, folder, on_epoch
        device = usable(settings.device)
        seed_everything(settings.seed)
        self.streams = self._loaders()
        self.distiller = self._distiller().to(device)
        process = self._followed()
        learns = recipe.meta_optimizer is not None
        searches = learns and recipe.method == "distpro"
        lengths = [math.ceil(len(self.streams.train) / settings.accumulate)] * recipe.epochs
        if recipe.halves and learns:
            half = math.ceil(len(self.streams.halves(settings.seed)[0]) / settings.accumulate)
            learns_in = getattr(self.distiller, "learns_in", lambda epoch: True)
            lengths = [half if learns_in(epoch) else steps for epoch, steps in enumerate(lengths)]
        self.ends = [0, *itertools.accumulate(lengths)]  # steps done before each epoch, and at the end
        self.steps = self.ends[-1]
        if process is not None:
            self.distiller.follow(process.resample(self.steps))
        optimizer = self._optimizer()

        numbered = "labels" in inspect.signature(METHODS[recipe.method]).parameters
        self.trainer = Trainer(
            self.distiller,
            Numbered(self.streams.train) if numbered else self.streams.train,
            optimizer,
            epochs=recipe.epochs,
            scheduler=self._scheduler(optimizer),
            validation_batches=self.streams.validation,
            meta_optimizer=self._meta_optimizer() if learns else None,
            meta=recipe.meta if learns else None,
            halves=(lambda epoch: self.streams.halves(settings.seed + epoch)) if recipe.halves else None,
            evaluation=self.streams.test,
            evaluate_every=settings.evaluate_every,
            precision=settings.precision,
            accumulate=settings.accumulate,
            ema=settings.ema,
            channels_last=settings.channels_last,
            compile=settings.compile,
            process=Process(self.distiller.pathways) if searches else None,
            teacher_cache=self._teacher_cache(say) if settings.cache_teacher else None,
            callback=callback,
            on_epoch=self._end_epoch,
            checkpoint=folder / CHECKPOINT,
            checkpoint_every=settings.checkpoint_every,
        )
        seed_everything(settings.seed, distributed.rank())
        if (folder / CHECKPOINT).exists():
            self.trainer.resume(folder / CHECKPOINT)
        elif distributed.rank() == 0:
            settings.save(folder)
            if process is not None:
                atomically(folder / "followed.safetensors", process.save)

    def run(self) -> dict:
        """Train to the end; returns what results.json holds."""
        self.trainer.run()
        if self.trainer.process is not None and distributed.rank() == 0:
            atomically(self.folder / PROCESS, self.trainer.process.save)
        return self.results()

    def results(self) -> dict:
        history = self.trainer.history
        return {
            "best": asdict(history.best) if history.best else None,
            "best_selected_on": history.selected_on,
            "last": asdict(history.last) if history.last else None,
            "epochs": [asdict(record) for record in history.epochs],
            "settings": asdict(self.settings),
        }

    def _end_epoch(self, record: EpochRecord) -> None:
        history, rank = self.trainer.history, distributed.rank()
        if rank == 0:
            about = {
                "network": bare_name(self.settings.student),
                "classes": self.streams.classes,
                "shape": self.streams.shape,
                "epoch": record.epoch,
                "accuracy": record.accuracy,
            }
            names = ["last"] + (["best"] if history.best is record else [])
            for which in names:
                write_student(self.folder / f"{which}.safetensors", self.trainer.student, about)
            write_json(self.folder / RESULTS, self.results())
        self._told(record)

    def _loaders(self) -> Streams:
        recipe, settings = self.settings.recipe, self.settings
        return loaders(
            settings.data,
            batch_size=recipe.batch_size,
            validation=recipe.held_out,
            seed=settings.seed,
            loader=settings.loader,
            augment=recipe.augment,
            size=settings.size,
            variants=settings.variants,
            learns=recipe.meta_optimizer is not None,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            device=settings.device,
            workers=settings.workers,
            download=settings.download,
            on_broken=settings.on_broken,
            broken_limit=settings.broken_limit,
        )

    def _teacher_cache(self, say: Callable[[str], None]) -> TeacherCache:
        settings, first = self.settings, distributed.rank() == 0
        about = f"{settings.precision} on {torch.device(settings.device).type}"  # what its last digits depend on
        about += ", channels last" * settings.channels_last + ", compiled" * settings.compile
        folder = Path(settings.cache_teacher).expanduser()
        cache = TeacherCache(folder, self.distiller, self.streams.train, settings.recipe.epochs, about)
        problem = None
        if first:
            say(
                f"The teacher's outputs are kept in {cache.folder}: {in_bytes(cache.size)} for {cache.variants} "
                f"variant(s) of {cache.images} images."
            )
            try:
                cache.open()
            except (ValueError, OSError) as error:
                problem = error
            if cache.begun_anew:
                say(cache.begun_anew)
        # The others come when it is there, and end with the same sentence where it is not.
        if problem := distributed.gathered(problem)[0]:
            raise problem
        if not first:
            cache.join()
        return cache

    def _distiller(self) -> Distiller:
        settings, recipe = self.settings, self.settings.recipe
        kind = METHODS[recipe.method]
        parameters = inspect.signature(kind).parameters
        networks = [self._network(settings.student, settings.student_layers)]
        if "teacher" in parameters:
            if settings.teacher is None:
                raise ValueError(
                    f"{recipe.method} needs a teacher; train one with 'kdfast train alone' and name its file."
                )
            networks.append(self._network(settings.teacher, settings.teacher_layers, trained=True))
        elif unwanted := settings.teacher or settings.teacher_layers:
            raise ValueError(f"{recipe.method} takes no teacher, got {unwanted}; leave it out.")
        check_options(recipe.method, recipe.options)
        given = dict(recipe.options)
        if "peer" in parameters:
            given["peer"] = self._network(settings.student, settings.student_layers)
        if "labels" in parameters:
            given["labels"] = self.streams.train.labels
        try:
            return kind(*networks, **given)
        except TypeError as error:
            raise ValueError(f"{recipe.method} cannot be made of these options: {error}") from error

    def _network(self, description: str, layers: str | None, trained: bool = False) -> nn.Module:
        shape = self.streams.shape
        network = network_of(description, classes=self.streams.classes, in_channels=shape[0], trained=trained)
        if layers is None:
            return network
        return Tapped(network, [layer.strip() for layer in layers.split(",")], torch.zeros(2, *shape))

    def _followed(self) -> Process | None:
        """The process to follow: the copy this training took with it, or the file it was told."""
        recipe = self.settings.recipe
        if self.settings.process is None:
            if recipe.method == "distpro" and recipe.meta_optimizer is None:
                raise ValueError(
                    "distpro needs a process to follow, or a recipe that searches one: distpro-cifar100-search."
                )
            return None
        if recipe.meta_optimizer is not None:
            raise ValueError("A training that follows a process learns no weights; take the recipe distpro-cifar100.")
        if recipe.method != "distpro":
            raise ValueError(f"Only distpro follows a process, got one for {recipe.method}.")
        copy = self.folder / "followed.safetensors"
        return read_process(copy if copy.exists() else Path(self.settings.process))

    def _optimizer(self) -> torch.optim.Optimizer:
        recipe, parameters = self.settings.recipe, self.distiller.inner_parameters()
        if recipe.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
        sgd = {"momentum": recipe.momentum, "nesterov": recipe.nesterov, "weight_decay": recipe.weight_decay}
        return torch.optim.SGD(parameters, lr=recipe.lr, **sgd)

    def _meta_optimizer(self) -> torch.optim.Optimizer:
        recipe = self.settings.recipe
        parameters = list(self.distiller.meta_parameters())
        if not parameters:
            raise ValueError(f"{recipe.method} learns no meta-parameters; leave its recipe's meta_optimizer at None.")
        if not (recipe.held_out or recipe.halves or recipe.meta.get("validation") == "rolling"):
            raise ValueError(
                f"{recipe.method} learns its meta-parameters on images that are held out, got held_out 0; hold some "
                "out (held_out=0.1), or learn on the next training batch (meta={'validation': 'rolling'})."
            )
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.meta_optimizer]
        options = {"lr": recipe.meta_lr, "betas": recipe.meta_betas, "weight_decay": recipe.meta_weight_decay}
        return kind(parameters, **options)

    def _scheduler(self, optimizer: torch.optim.Optimizer):
        recipe = self.settings.recipe
        if recipe.schedule == "constant":
            return None
        if recipe.schedule == "cosine":
            return warmup_cosine(optimizer, self.steps, recipe.warmup / recipe.epochs, recipe.end)
        return step_decay(optimizer, [self.ends[min(epoch, recipe.epochs)] for epoch in recipe.milestones])


class Numbered:
    """A stream whose targets are (targets, indices): for methods that remember every image."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self.state_dict, self.load_state_dict = stream.state_dict, stream.load_state_dict

    @property
    def samples(self) -> Tensor:
        return self._stream.samples

    @property
    def variant(self) -> int:
        return self._stream.variant

    def __len__(self) -> int:
        return len(self._stream)

    def __iter__(self) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        for inputs, targets in self._stream:
            yield inputs, (targets, self._stream.indices.to(targets.device))


def read_process(path: Path) -> Process:
    """A stored process.

    Raises:
        ValueError: for a file that is missing, cut short, edited or of something else; one sentence.
    """
    if not path.is_file():
        raise ValueError(f"{path} must be a process a DistPro search stored, but there is no such file.")
    try:
        process = Process.load(path)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a process ({error}); search again or use another copy.") from error
    shape = (len(process), len(process.pathways))
    sound = process.weights.shape == process.raw.shape == shape and len(process) > 0
    if (
        not sound
        or not process.raw.isfinite().all()
        or not (process.weights >= 0).all()
        or process.weights.sum(1).max() > 1.001
    ):
        raise ValueError(
            f"{path} holds no weights of {shape[1]} pathways that a search could have found; it was edited."
        )
    return process
