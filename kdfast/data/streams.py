"""Data sets by name as streams of batches, which can go on in the middle of an epoch."""

import numbers
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast.data.augment import Augment, draw_mix
from kdfast.data.dali import Dali, available
from kdfast.data.engines import Engine, Request, Work, blend_targets
from kdfast.data.files import Broken, Files
from kdfast.data.resident import Resident
from kdfast.data.sources import Source, read_source
from kdfast.data.tensors import ImageSet, split_indices
from kdfast.data.vision import Vision

LOADERS = ("auto", "resident", "dali", "torchvision")
ENGINES = {"resident": Resident, "dali": Dali, "torchvision": Vision}
AHEAD = 2  # batches that are prepared while the training takes a step
WORTHWHILE = 0.005  # seconds a step takes at least, to hand it a resident batch from another thread


class Stream:
    """Batches of images, each epoch in a new order that depends on seed and epoch alone.

    Args:
        data: images in memory, uint8 or float, or in files.
        mean, deviation: of each channel, subtracted and divided by.
        batch_size: images a batch, of each process.
        seed: of the orders and the augmentation; None: always in the set's order and unchanged, the last batch may be
            smaller.
        augment: see `Augment.parse`.
        members: which of the images the stream gives; all unless given.
        loader: "resident", "dali" or "torchvision"; "auto": the first of these that can.
        variants: how many ways of augmenting each image recur, epoch by epoch; None: never the same twice.
        classes: how many, needed where images are mixed.
        rank, world_size: this process's share of each order.
        device: of the batches.
        workers: threads or processes that prepare batches; one a core of this process unless given.

    Attributes:
        labels: [images] of those that the stream gives.
        indices: [batch] of the batch last given, in `labels`.
        samples: the same, in `data`.
        variant: of the augmentation in it.
    """

    def __init__(
        self,
        data: ImageSet | Files,
        mean: Tensor,  # [channels]
        deviation: Tensor,  # [channels]
        batch_size: int,
        *,
        seed: int | None = None,
        augment: str = "none",
        members: Tensor | None = None,  # [images], int64
        loader: str = "auto",
        variants: int | None = None,
        classes: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        workers: int | None = None,
    ):
        _check_whole(batch_size=(batch_size, 1), workers=(workers, 0), seed=(seed, 0), variants=(variants, 1))
        if isinstance(data, ImageSet):
            _check_images(data, mean, deviation)
        self.data, self.augment = data, Augment.parse(augment) if seed is not None else Augment()
        self.members = torch.arange(len(data.labels)) if members is None else members
        self.labels = data.labels.cpu()[self.members]
        if not len(self.labels):
            raise ValueError("A stream needs at least one image, got none.")
        if self.augment.mixes and classes is None:
            raise ValueError("Where images are mixed, targets are probabilities: say how many `classes` there are.")
        self.batch_size, self.seed, self.variants, self.classes = batch_size, seed, variants, classes
        self.rank, self.world_size, self.device = rank, world_size, usable(device)
        self.loader = choose_loader(loader, data, self.augment)
        self._epoch = self._position = 0
        self._worked = 0.0  # seconds the last batch was worked on
        self.indices = self.samples = torch.empty(0, dtype=torch.int64)
        self.variant = 0
        self._placed = None  # where a sample is in `labels`: broken images are replaced
        if isinstance(data, Files):
            self._placed = {sample: place for place, sample in enumerate(self.members.tolist())}
        if workers is None:
            workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        members_sorted, mean, deviation = self.members.sort().values.numpy(), mean.float(), deviation.float()
        self.work = Work(
            data, members_sorted, mean[:, None, None], deviation[:, None, None], self.augment, batch_size, self.device,
            workers,
        )  # fmt: skip
        self._engine: Engine = ENGINES[self.loader](self.work)

    def __len__(self) -> int:
        """Batches an epoch."""
        count = len(self.labels)
        if self.seed is None:
            return -(-count // self.batch_size)
        return max(count // (self.batch_size * self.world_size), 1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._position >= len(self):
            self._epoch, self._position = self._epoch + 1, 0
        order, epoch = self._order(), self._epoch
        variant = epoch % self.variants if self.variants else epoch
        if self.augment == Augment():
            variant = 0
        places, samples = range(self._position, len(self)), self.members[order].numpy()
        requests = [self._request(samples, at, variant) for at in places]
        batches = self._engine.batches(requests)
        if self.loader == "dali":
            batches = ahead(batches, AHEAD)
        elif self.loader == "resident" and self.device.type == "cpu":
            batches = ahead(batches, AHEAD, lambda: self._worked >= WORTHWHILE)
        for at, request, (images, samples) in zip(places, requests, batches, strict=True):
            self._epoch, self._position = epoch, at + 1
            self.indices = order[at * self.batch_size : (at + 1) * self.batch_size]
            if self._placed is not None:
                self.indices = torch.tensor([self._placed[sample] for sample in samples.tolist()])
            self.samples, self.variant = torch.from_numpy(samples), variant
            labels = self.labels[self.indices].to(self.device)
            start = time.perf_counter()
            yield images, labels if request.mix is None else blend_targets(labels, self.classes, request.mix)
            self._worked = time.perf_counter() - start
        self._epoch, self._position = epoch + 1, 0

    def _order(self) -> Tensor:
        """[images of this process] positions in `labels`."""
        count = len(self.labels)
        if self.seed is None:
            return torch.arange(count)
        seeds = np.random.SeedSequence([self.seed, self._epoch])
        generator = torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
        order = torch.randperm(count, generator=generator)
        whole = len(self) * self.batch_size * self.world_size
        return order.repeat(-(-whole // count))[:whole][self.rank :: self.world_size]

    def _request(self, samples: np.ndarray, at: int, variant: int) -> Request:  # [images of this process]
        samples = samples[at * self.batch_size : (at + 1) * self.batch_size]
        seeds = (self.seed or 0, self._epoch, at, self.rank)
        mix = draw_mix(self.augment, seeds, *self.work.shape[1:])
        return Request(samples, self.seed or 0, variant, mix)

    def state_dict(self) -> dict[str, int]:
        """Where it stands: the epoch, and the batches of it that were given."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration goes on there."""
        self._epoch, self._position = state["epoch"], state["position"]


def ahead(items: Iterator, count: int, wanted: Callable[[], bool] = lambda: True) -> Iterator:
    """The items, of which `count` are made beforehand in a thread, while whoever takes them works.

    Args:
        wanted: asked before each item is given: whether to; if not, the next is made when it is asked for.
    """
    end = object()
    pending: deque[Future] = deque()
    with ThreadPoolExecutor(1) as pool:
        while (item := pending.popleft().result() if pending else next(items, end)) is not end:
            while wanted() and len(pending) < count:
                pending.append(pool.submit(next, items, end))
            yield item


def usable(device: str | torch.device) -> torch.device:
    """The device, if this machine and this torch have it.

    Raises:
        ValueError: if not, with torch's reason.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # by what is missing
        reason = str(error).split("\n")[0].rstrip(".")
        raise ValueError(f"device must be one that this torch can use here, got {str(device)!r} ({reason}).") from error
    return found


def _check_whole(**options: tuple[Any, int]) -> None:
    """That each option is a whole number of at least so much, or None where it was not given."""
    for name, (value, least) in options.items():
        if value is not None and not isinstance(value, numbers.Integral):
            raise ValueError(f"{name} must be a whole number, got {value!r}.")
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")


def _check_images(data: ImageSet, mean: Tensor, deviation: Tensor) -> None:
    shape, channels = tuple(data.images.shape), {len(mean), len(deviation)}
    if len(shape) != 4 or tuple(data.labels.shape) != shape[:1] or channels != {shape[1]}:
        raise ValueError(
            "A stream needs images [count, channels, height, width], a label for each, and a mean and a deviation for "
            f"each channel, got {list(shape)}, {list(data.labels.shape)}, {list(mean.shape)} and "
            f"{list(deviation.shape)}."
        )


def choose_loader(loader: str, data: ImageSet | Files, augment: Augment) -> str:
    """The back end: the one asked for, or the fastest that can."""
    if loader not in LOADERS:
        raise ValueError(f"loader must be one of {', '.join(map(repr, LOADERS))}, got {loader!r}.")
    if loader == "resident" and isinstance(data, Files):
        raise ValueError("The resident loader needs images in memory; take loader 'dali' or 'torchvision'.")
    if loader != "auto":
        return loader
    if isinstance(data, ImageSet) and not augment.color and not augment.randaugment:
        return "resident"
    return "dali" if available() else "torchvision"


class Streams:
    """A data set's streams: `train`, `validation` (None unless some is held out) and `test`.

    Args:
        source: the data set.
        validation: share of the training images that is held out.
        seed: of the split and the orders.
        learns: whether the held-out images are learned on, and so augmented and shuffled, or only measured.
        options: of the streams.

    Attributes:
        classes: how many.
        shape: (channels, height, width) of the images.
        broken: paths of images that could not be read, so far.
    """

    def __init__(self, source: Source, validation: float, seed: int, learns: bool, **options: Any):
        self.source, self._fraction, self._learns = source, validation, learns
        self._options = {**options, "classes": len(source.classes)}
        self.classes, self.broken = len(source.classes), source.broken.paths
        fixed = {name: options[name] for name in ("loader", "device", "workers")}
        self.test = Stream(source.test, source.mean, source.deviation, 256, **fixed)
        self.shape = self.test.work.shape
        self.resplit(seed)

    def resplit(self, seed: int) -> None:
        """Draw the training and validation parts anew, in new streams."""
        self.train, self.validation = self._parts(None, self._fraction, seed, self._learns)

    def halves(self, seed: int) -> tuple[Stream, Stream]:
        """Two random halves of the training part, of each class, as streams of their own."""
        return self._parts(self.train.members, 0.5, seed, True)

    def _parts(self, members: Tensor | None, fraction: float, seed: int, learns: bool) -> tuple[Stream, Stream | None]:
        if not fraction:
            return self._stream(members, seed), None
        labels = self.source.train.labels.cpu()
        members = torch.arange(len(labels)) if members is None else members
        counts = labels[members].bincount(minlength=self.classes)
        if counts.min() < 2:
            name = self.source.classes[int(counts.argmin())]
            raise ValueError(
                f"To split the training images each class needs at least two, got {int(counts.min())} of {name}."
            )
        kept, held = split_indices(labels[members], fraction, seed)
        return self._stream(members[kept], seed), self._stream(members[held], seed + 1, learns)

    def _stream(self, members: Tensor | None, seed: int, learns: bool = True) -> Stream:
        options, source = dict(self._options), self.source
        count = len(source.train.labels) if members is None else len(members)
        options["batch_size"] = min(options["batch_size"], count)
        if not learns:
            return Stream(
                source.train, source.mean, source.deviation, 256, members=members,
                **{name: options[name] for name in ("loader", "device", "workers")},
            )  # fmt: skip
        return Stream(source.train, source.mean, source.deviation, seed=seed, members=members, **options)


def loaders(
    spec: str,
    *,
    batch_size: int,
    validation: float = 0.0,
    seed: int = 0,
    loader: str = "auto",
    augment: str = "none",
    size: int | None = None,
    variants: int | None = None,
    learns: bool = True,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    download: bool = False,
    on_broken: str = "stop",
    broken_limit: int = 100,
) -> Streams:
    """The streams of a data set.

    Args:
        spec: "digits"; "cifar10:ROOT" and "cifar100:ROOT" as torchvision stores them; "folder:ROOT" with
            ROOT/train/CLASS/* and ROOT/test/CLASS/* (or val); "tiny-imagenet:ROOT", the unpacked archive.
        batch_size: images a batch, of each process.
        validation: share of the training images that is held out, of each class, in [0, 1).
        seed: of the split, the orders and the augmentation, >= 0.
        loader: "resident": images kept once in memory, augmented as whole batches; "dali": a pipeline of NVIDIA DALI;
            "torchvision": a DataLoader. "auto": resident where the images are small and it has the augmentations, else
            DALI where it is installed, else torchvision.
        augment: of the training images, "none", or as "crop_flip+cutout": see `kdfast.data.augment.Augment`.
        size: height and width that images in files are cut and resized to; 224 unless given, but images that all have
            one size of at most 96 pixels keep it.
        variants: how many ways of augmenting each image recur, epoch by epoch; None: never the same twice.
        learns: whether held-out images are learned on, and so augmented and shuffled too, or only measured.
        rank, world_size: this process, of how many.
        device: of the batches.
        workers: threads or processes of a stream; one a core unless given.
        download: fetch CIFAR where it is not there.
        on_broken: "stop" at an image that cannot be read, or "skip" it, named in a warning.
        broken_limit: how many are skipped at most.

    Raises:
        ValueError: for an unknown name, a wrong path, an empty part, broken images; one sentence.
        ImportError: for a loader that is not installed, naming the command that installs it.

    Example:
        >>> streams = loaders("cifar100:data", batch_size=64, validation=0.2, augment="crop_flip", download=True)
        >>> images, labels = next(iter(streams.train))
    """
    if not isinstance(validation, numbers.Real) or not 0 <= validation < 1:
        raise ValueError(f"validation must be a share of the training images in [0, 1), got {validation!r}.")
    _check_whole(batch_size=(batch_size, 1), seed=(seed, 0), variants=(variants, 1), workers=(workers, 0))
    Augment.parse(augment)
    if loader not in LOADERS:
        raise ValueError(f"loader must be one of {', '.join(map(repr, LOADERS))}, got {loader!r}.")
    device = usable(device)
    in_memory = {"auto": None, "resident": True}.get(loader, False)
    source = read_source(spec, Broken(on_broken, broken_limit), download=download, size=size, in_memory=in_memory)
    if loader in ("auto", "resident"):  # one copy, for all streams
        for name in ("train", "test"):
            images = getattr(source, name)
            if isinstance(images, ImageSet) and choose_loader(loader, images, Augment.parse(augment)) == "resident":
                setattr(source, name, ImageSet(images.images.to(device), images.labels))
    options = {
        "batch_size": batch_size, "augment": augment, "loader": loader, "variants": variants, "rank": rank,
        "world_size": world_size, "device": device, "workers": workers,
    }  # fmt: skip
    return Streams(source, validation, seed, learns, **options)
