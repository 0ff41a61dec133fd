"""Data sets by name as streams of batches, which can go on in the middle of an epoch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdfast.data.digits import load_digits
from kdfast.data.tensors import ImageSet

AUGMENTS = ("none", "crop_flip")


class Stream:
    """Batches of images held in memory, each epoch in a new order that depends on seed and epoch alone.

    Args:
        data: images, uint8 or float.
        mean, deviation: of each channel, subtracted and divided by.
        batch_size: images a batch, of each process.
        seed: of the orders and the augmentation; None: always in the set's order, the last batch may be smaller.
        augment: "none", or "crop_flip": padded by an eighth of the height and cut at random, mirrored at random.
        rank, world_size: this process's share of each order.
        device: of the batches.
    """

    def __init__(
        self,
        data: ImageSet,
        mean: Tensor,  # [channels]
        deviation: Tensor,  # [channels]
        batch_size: int,
        *,
        seed: int | None = None,
        augment: str = "none",
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
    ):
        self.data, self.mean, self.deviation = data, mean[:, None, None], deviation[:, None, None]
        self.batch_size, self.seed, self.augment = batch_size, seed, augment
        self.rank, self.world_size, self.device = rank, world_size, device
        self._epoch = self._position = 0
        self.indices = torch.empty(0, dtype=torch.int64)  # of the batch last given, in `data`

    def __len__(self) -> int:
        """Batches an epoch."""
        count = len(self.data.labels)
        if self.seed is None:
            return -(-count // self.batch_size)
        return max(count // (self.batch_size * self.world_size), 1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._position >= len(self):
            self._epoch, self._position = self._epoch + 1, 0
        order = self._order()
        while self._position < len(self):
            at = self._position
            self._position += 1
            self.indices = order[at * self.batch_size : (at + 1) * self.batch_size]
            images, labels = self.data.take(self.indices)
            images = (images.float() - self.mean) / self.deviation
            yield self._augmented(images, at).to(self.device), labels.to(self.device)
        self._epoch, self._position = self._epoch + 1, 0

    def _order(self) -> Tensor:
        count = len(self.data.labels)
        if self.seed is None:
            return torch.arange(count)
        order = torch.randperm(count, generator=self._generator(-1))
        whole = len(self) * self.batch_size * self.world_size
        return order.repeat(-(-whole // count))[:whole][self.rank :: self.world_size]

    def _generator(self, batch: int) -> torch.Generator:
        seeds = np.random.SeedSequence([self.seed or 0, self._epoch, batch + 1, self.rank if batch >= 0 else 0])
        return torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))

    def _augmented(self, images: Tensor, batch: int) -> Tensor:  # [batch, channels, height, width]
        if self.augment == "none" or self.seed is None:
            return images
        generator = self._generator(batch)
        count, _, height, width = images.shape
        shift = height // 8
        padded = nn.functional.pad(images, (shift,) * 4)
        top, left = torch.randint(2 * shift + 1, (2, count, 1), generator=generator)
        columns = left + torch.arange(width)  # [batch, width]
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)[:, None, :]
        rows = (top + torch.arange(height))[:, :, None]  # [batch, height, 1]
        return padded[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2).contiguous()

    def state_dict(self) -> dict[str, int]:
        """Where it stands: the epoch, and the batches of it that were given."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration goes on there."""
        self._epoch, self._position = state["epoch"], state["position"]


class Streams:
    """A data set's streams: `train`, `validation` (None unless some is held out) and `test`.

    Attributes:
        classes: how many.
        shape: (channels, height, width) of the images.
    """

    def __init__(self, train: ImageSet, test: ImageSet, classes: int, validation: float, seed: int, **options: Any):
        self._whole, self._fraction, self._seed, self._options = train, validation, seed, options
        self.classes, self.shape = classes, tuple(train.images.shape[1:])
        channels = train.images.float().transpose(0, 1).flatten(1)  # [channels, pixels]
        self._mean, self._deviation = channels.mean(1), channels.std(1).clamp(min=1e-6)
        self.test = Stream(test, self._mean, self._deviation, 256, device=options.get("device", "cpu"))
        self.resplit(seed)

    def resplit(self, seed: int) -> None:
        """Draw the training and validation parts anew, in new streams."""
        kept, held = self._whole, None
        if self._fraction:
            kept, held = self._whole.split(self._fraction, seed)
        self.train = self._stream(kept, seed)
        self.validation = None if held is None else self._stream(held, seed + 1)

    def _stream(self, data: ImageSet, seed: int) -> Stream:
        options = {**self._options, "batch_size": min(self._options["batch_size"], len(data.labels))}
        return Stream(data, self._mean, self._deviation, seed=seed, **options)


def loaders(
    spec: str,
    *,
    batch_size: int,
    validation: float = 0.0,
    seed: int = 0,
    augment: str = "none",
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    on_broken: str = "stop",
) -> Streams:
    """The streams of a data set.

    Args:
        spec: "digits", or "folder:ROOT" with ROOT/train/CLASS/*.png and ROOT/test/CLASS/*.png of one size.
        batch_size: images a batch, of each process.
        validation: share of the training images that is held out, in [0, 1).
        seed: of the split and the orders.
        augment: of the training images, "none" or "crop_flip".
        rank, world_size: this process, of how many.
        device: of the batches.
        on_broken: "stop" at an image that cannot be read, or "skip" it.

    Raises:
        ValueError: for an unknown name, broken images, fewer than two classes; one sentence.
    """
    if not 0 <= validation < 1:
        raise ValueError(f"validation must be a share of the training images in [0, 1), got {validation}.")
    if augment not in AUGMENTS:
        raise ValueError(f"augment must be one of {', '.join(map(repr, AUGMENTS))}, got {augment!r}.")
    kind, _, root = spec.partition(":")
    if spec == "digits":
        split = load_digits(100, 0)
        train, test, classes = split.train, split.test, 10
    elif kind == "folder" and root:
        train, names = _read_folder(Path(root) / "train", None, on_broken)
        test, _ = _read_folder(Path(root) / "test", names, on_broken)
        classes = len(names)
    else:
        raise ValueError(f"The data must be 'digits' or 'folder:ROOT', got {spec!r}.")
    options = {"batch_size": batch_size, "augment": augment, "rank": rank, "world_size": world_size, "device": device}
    return Streams(train, test, classes, validation, seed, **options)


def _read_folder(folder: Path, names: list[str] | None, on_broken: str) -> tuple[ImageSet, list[str]]:
    from PIL import Image

    if not folder.is_dir():
        raise ValueError(f"{folder} must be a folder with a folder of images for each class; there is none.")
    found = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if len(found) < 2:
        raise ValueError(f"{folder} must hold a folder for each of at least two classes, got {len(found)}.")
    if names is not None and found != names:
        raise ValueError(
            f"{folder} must have the {len(names)} classes of the training images, got {len(found)} others."
        )
    images, labels = [], []
    for label, name in enumerate(found):
        for path in sorted((folder / name).iterdir()):
            try:
                image = np.asarray(Image.open(path).convert("RGB"))
            except OSError as error:
                if on_broken == "skip":
                    continue
                raise ValueError(
                    f"{path} cannot be read as an image ({error}); remove it, or pass over such with on_broken 'skip'."
                ) from error
            images.append(image)
            labels.append(label)
    if missing := set(range(len(found))) - set(labels):
        raise ValueError(f"{folder / found[min(missing)]} must hold images of its class, got none that can be read.")
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise ValueError(f"The images in {folder} must be of one size, got {len(shapes)} sizes; resize them first.")
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return ImageSet(stacked, torch.tensor(labels)), found
