"""Images held in memory as two tensors, and a loader that cuts, shuffles and shifts batches of them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn


class ImageSet(NamedTuple):
    """Images and their class indices."""

    images: Tensor  # [count, channels, height, width]
    labels: Tensor  # [count], int64

    def take(self, indices: Tensor) -> "ImageSet":  # [chosen], int64
        """The chosen images, in the order given."""
        return ImageSet(self.images[indices], self.labels[indices])

    def split(self, fraction: float, seed: int) -> tuple["ImageSet", "ImageSet"]:
        """Two disjoint parts of the set, ``1 - fraction`` and ``fraction`` of each class (at least one image each).

        Args:
            fraction: share of the second part, in (0, 1).
            seed: chooses which images; the same seed gives the same split on every machine.
        """
        first, second = split_indices(self.labels, fraction, seed)
        return self.take(first), self.take(second)


def split_indices(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Which images the two parts of `ImageSet.split` have."""
    generator = torch.Generator().manual_seed(seed)
    first, second = [], []
    for members in labels.argsort(stable=True).split(labels.bincount().tolist()):
        members = members[torch.randperm(len(members), generator=generator)]
        held = min(max(round(fraction * len(members)), 1), len(members) - 1)
        second.append(members[:held])
        first.append(members[held:])
    return torch.cat(first), torch.cat(second)


class TensorLoader:
    """Batches of an `ImageSet`, in a random order, each image shifted at random.

    Every batch is full, because BatchNorm fails on a stray batch of one image: an order that ends in the middle of a
    batch is continued by the next one, so that over time each image is seen as often as every other.

    Args:
        data: the images.
        batch_size: images a batch; no more than the set has.
        seed: of orders and shifts. Two loaders with one seed give the same batches.
        batches: how many make one pass; by default as many as the set fills.
        shift: each image is moved by up to this many pixels in each direction, filled with ``background``.
        background: value of the pixels that move in.

    Raises:
        ValueError: when the set has fewer images than one batch.

    Example:
        >>> data = ImageSet(torch.randn(10, 1, 8, 8), torch.arange(10))
        >>> [len(labels) for images, labels in TensorLoader(data, 4, seed=0)]
        [4, 4]
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        *,
        seed: int,
        batches: int | None = None,
        shift: int = 0,
        background: float = 0.0,
    ):
        if not 1 <= batch_size <= len(data.labels):
            raise ValueError(f"batch_size must be in [1, {len(data.labels)}], the images there are, got {batch_size}.")
        self.data, self.batch_size, self.shift, self.background = data, batch_size, shift, background
        self.batches = len(data.labels) // batch_size if batches is None else batches
        self.generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)  # what is left of the newest order

    def __len__(self) -> int:
        """Batches a pass."""
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.batches):
            if len(self._order) < self.batch_size:
                fresh = torch.randperm(len(self.data.labels), generator=self.generator)
                self._order = torch.cat([self._order, fresh])
            chosen, self._order = self._order[: self.batch_size], self._order[self.batch_size :]
            images, labels = self.data.take(chosen)
            yield self._shifted(images), labels

    def _shifted(self, images: Tensor) -> Tensor:  # [batch, channels, height, width]
        if not self.shift:
            return images
        batch, _, height, width = images.shape
        padded = nn.functional.pad(images, (self.shift,) * 4, value=self.background)
        top, left = torch.randint(2 * self.shift + 1, (2, batch, 1), generator=self.generator)
        rows = (top + torch.arange(height))[:, :, None]  # [batch, height, 1]
        columns = (left + torch.arange(width))[:, None, :]  # [batch, 1, width]
        return padded[torch.arange(batch)[:, None, None], :, rows, columns].permute(0, 3, 1, 2).contiguous()
