"""The comparison behind `kdfast compare`: one teacher, then one student a method and seed, all else equal."""

import inspect
import multiprocessing
import signal
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch

from kdfast.data import DigitsSplit, ImageSet, TensorLoader, load_digits
from kdfast.meta import Process
from kdfast.methods import METHODS, Alone, Distiller
from kdfast.models import CifarResNet
from kdfast.train import distributed
from kdfast.train.comparison import TITLES, Comparison, Recipe, Run
from kdfast.train.files import atomically
from kdfast.train.history import StepRecord
from kdfast.train.loop import Batches, repeated_warmup_cosine
from kdfast.train.trainer import Trainer


def compare(
    recipe: Recipe,
    folder: Path,
    *,
    methods: Sequence[str] = tuple(TITLES),
    seeds: Sequence[int] = (0, 1, 2),
    evaluate_on: str = "test",
    processes: int = 1,
    on_run: Callable[[str, Run], None] = lambda training, run: None,
) -> Comparison:
    """Train a teacher on the digits, then a student by each method with each seed, all else equal.

    Same training images, student, initial weights, optimizer, schedule and number of steps. A seed gives the same
    result again on the same machine, whichever other methods run, in however many processes.

    Args:
        recipe: the numbers.
        folder: where DistPro's processes are stored, ``process-seed<seed>.safetensors``; it must exist.
        methods: names of `TITLES`.
        seeds: of the students: initial weights, batches, shifts. The first one is the teacher's too.
        evaluate_on: "test", or "validation" to choose the numbers of a recipe.
        processes: in how many of them the students are trained, each with one thread; 1: in this one. Under torchrun
            each training is all its processes', which share every batch out, and this is 1.
        on_run: called with the training's name and result after each training.

    Raises:
        ImportError: without scikit-learn, which carries the digits; it names the command that installs it.
        ValueError: for fewer epochs than a method has phases.
    """
    split = load_digits(recipe.train_per_class, recipe.validation_per_class)
    phases = len(recipe.student_widths) + 1
    if "stagewise" in methods and recipe.epochs < phases:
        raise ValueError(
            f"stagewise needs at least an epoch a phase, {phases} in all, got {recipe.epochs}; take more, or leave it "
            "out of the methods."
        )
    bench = _Bench(recipe, split, evaluate_on, folder)
    with torch.random.fork_rng(devices=[]):
        teacher, teacher_run = bench.teacher(seeds[0])
        on_run("teacher", teacher_run)
        trainings = [(name, seed) for seed in seeds for name in methods]
        results: dict[tuple[str, int], Run] = {}
        if processes == 1:
            for name, seed in trainings:
                results[name, seed] = bench.run(name, teacher, seed)
                on_run(_training(name, seed), results[name, seed])
        else:
            spawn = multiprocessing.get_context("spawn")  # a fork would take over the thread pools' locks
            others = set(multiprocessing.active_children())
            with ProcessPoolExecutor(processes, spawn, _begin_process) as pool:
                waiting = {pool.submit(bench.run, name, teacher, seed): (name, seed) for name, seed in trainings}
                try:
                    for done in as_completed(waiting):
                        results[waiting[done]] = done.result()
                        on_run(_training(*waiting[done]), done.result())
                except BaseException:  # one failed, or Ctrl-C: the pool would first do all that is left
                    pool.shutdown(wait=False, cancel_futures=True)
                    for child in set(multiprocessing.active_children()) - others:
                        child.terminate()
                        child.join()
                    raise
        networks = {"teacher": teacher, "student": bench.student(seeds[0])}
    return Comparison(
        recipe=recipe,
        data="digits",
        evaluated_on=evaluate_on,
        images={name: len(getattr(split, name).labels) for name in ("train", "validation", "test")},
        seeds=tuple(seeds),
        teacher=teacher_run,
        parameters={name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()},
        runs={name: [results[name, seed] for seed in seeds] for name in methods},
    )


def _begin_process() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to act on


def _training(method: str, seed: int) -> str:
    return f"{TITLES[method]}, seed {seed}"


class _Bench:
    """What all trainings share."""

    def __init__(self, recipe: Recipe, split: DigitsSplit, evaluate_on: str, folder: Path):
        self.recipe, self.split, self.folder = recipe, split, folder
        self.evaluation: ImageSet = getattr(split, evaluate_on)

    def network(self, depth: int, widths: Sequence[int]) -> CifarResNet:
        return CifarResNet(depth, widths, in_channels=1, classes=10)

    def student(self, seed: int) -> CifarResNet:
        """The student with the initial weights of a seed; what is drawn after it is the seed's too."""
        torch.manual_seed(seed)
        return self.network(self.recipe.student_depth, self.recipe.student_widths)

    def distiller(self, method: str, teacher: CifarResNet, seed: int) -> Distiller:
        kind = METHODS[method]
        networks = (self.student(seed), teacher)[: 1 + ("teacher" in inspect.signature(kind).parameters)]
        return kind(*networks, **self.recipe.options(method))

    def loader(self, data: ImageSet, seed: int, shift: int = 0) -> Batches:
        whole = TensorLoader(
            data,
            min(self.recipe.batch_size, len(data.labels)),
            seed=seed,
            batches=self.recipe.epoch_steps,  # also of a part of the images, so that all trainings have equal steps
            shift=shift,
            background=self.split.background,
        )
        return whole if distributed.world_size() == 1 else distributed.Share(whole)

    def train(
        self,
        distiller: Distiller,
        batches: Batches,
        epochs: int,
        after_step: Callable[[StepRecord], None] = lambda record: None,
        *,
        weight_decay: float | None = None,
        phases: Sequence[int] | None = None,  # epochs of each, with a schedule of its own
        **options,
    ) -> Run:
        """Train with the recipe's optimizer and schedule, and the `Trainer`'s other `options`."""
        recipe = self.recipe
        optimizer = torch.optim.AdamW(
            distiller.inner_parameters(),
            lr=recipe.lr,
            weight_decay=recipe.weight_decay if weight_decay is None else weight_decay,
        )
        lengths = [phase * recipe.epoch_steps for phase in phases or (epochs,)]
        seconds = []

        def callback(record: StepRecord) -> None:
            seconds.append(record.seconds)
            after_step(record)

        history = Trainer(
            distiller,
            batches,
            optimizer,
            epochs=epochs,
            scheduler=repeated_warmup_cosine(optimizer, lengths, recipe.warmup),
            callback=callback,
            **{"evaluation": [self.evaluation], "evaluate_every": recipe.evaluate_every, **options},
        ).run()
        accuracy = [(record.steps, record.accuracy) for record in history.epochs if record.accuracy is not None]
        return Run(len(seconds), 1e3 * statistics.median(seconds), sum(seconds), accuracy)

    def teacher(self, seed: int) -> tuple[CifarResNet, Run]:
        recipe = self.recipe
        torch.manual_seed(seed)
        teacher = self.network(recipe.teacher_depth, recipe.teacher_widths)
        batches = self.loader(self.split.train, seed, recipe.teacher_shift)
        return teacher, self.train(
            Alone(teacher), batches, recipe.teacher_epochs, weight_decay=recipe.teacher_weight_decay
        )

    def run(self, method: str, teacher: CifarResNet, seed: int) -> Run:
        """A student by `method`: in a way of its own where `_Bench` has a method of this name."""
        own = getattr(self, f"_{method}", None)
        if own is not None:
            return own(teacher, seed)
        distiller = self.distiller(method, teacher, seed)
        return self.train(distiller, self.loader(self.split.train, seed), self.recipe.epochs)

    def _kd(self, teacher: CifarResNet, seed: int) -> Run:
        run = self.train(self.distiller("kd", teacher, seed), self.loader(self.split.train, seed), self.recipe.epochs)
        return replace(run, temperatures=[(self.recipe.kd_temperature, self.recipe.kd_temperature)] * run.steps)

    def _mkd(self, teacher: CifarResNet, seed: int) -> Run:
        """The student learns on one part of the training images, the temperatures on the other."""
        recipe, distiller, temperatures = self.recipe, self.distiller("mkd", teacher, seed), []

        def record_temperatures(record: StepRecord) -> None:
            tau_s, tau_t = distiller.temperatures()
            temperatures.append((tau_s.item(), tau_t.item()))

        kept, held = self.split.train.split(recipe.mkd_held_out, seed)
        run = self.train(
            distiller,
            self.loader(kept, seed),
            recipe.epochs,
            record_temperatures,
            validation_batches=self.loader(held, seed),
            meta_optimizer=torch.optim.AdamW(distiller.meta_parameters(), lr=recipe.mkd_lr),
        )
        return replace(run, temperatures=temperatures)

    def _distpro(self, teacher: CifarResNet, seed: int) -> Run:
        """Search on a part of the training images, store the process, stretch it, retrain afresh on all of them."""
        recipe = self.recipe
        path = self.folder / f"process-seed{seed}.safetensors"
        search = self.search(teacher, seed, path)
        process = Process.load(path).resample(recipe.epochs * recipe.epoch_steps)
        distiller = self.distiller("distpro", teacher, seed)
        distiller.follow(process)
        run = self.train(distiller, self.loader(self.split.train, seed), recipe.epochs)
        return replace(run, process=process, search=search)

    def search(self, teacher: CifarResNet, seed: int, path: Path) -> Run:
        recipe = self.recipe
        distiller = self.distiller("distpro", teacher, seed)
        process = Process(distiller.pathways)
        kept, held = self.split.train.split(recipe.distpro_held_out, seed)
        run = self.train(
            distiller,
            self.loader(kept, seed),
            recipe.distpro_search_epochs,
            validation_batches=self.loader(held, seed),
            meta_optimizer=torch.optim.Adam(distiller.meta_parameters(), lr=recipe.distpro_lr, betas=(0.5, 0.999)),
            evaluation=None,
            process=process,
        )
        if distributed.rank() == 0:
            atomically(path, process.save)
        distributed.gathered(None)  # nobody goes on before it is there
        return run

    def _metadistiller(self, teacher: CifarResNet, seed: int) -> Run:
        """All training images in most epochs; in those of the generator, a fresh half each for it and the student."""
        recipe, distiller = self.recipe, self.distiller("metadistiller", teacher, seed)

        def halves(epoch: int) -> tuple[Batches, Batches]:
            parts = self.split.train.split(0.5, 1000 * seed + epoch)
            return tuple(self.loader(part, 1000 * seed + epoch) for part in parts)

        return self.train(
            distiller,
            self.loader(self.split.train, seed),
            recipe.epochs,
            meta_optimizer=torch.optim.Adam(distiller.meta_parameters(), lr=recipe.metadistiller_lr),
            halves=halves,
        )

    def _stagewise(self, teacher: CifarResNet, seed: int) -> Run:
        """As many epochs for each stage as for the head; what is left over goes to the last phases."""
        distiller, left, phases = self.distiller("stagewise", teacher, seed), self.recipe.epochs, []
        for remaining in range(distiller.phases, 0, -1):
            phases.append(left // remaining)
            left -= phases[-1]
        return self.train(distiller, self.loader(self.split.train, seed), self.recipe.epochs, phases=phases)
