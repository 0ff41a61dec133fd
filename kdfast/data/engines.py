"""What the back ends of a stream share: how a batch is asked for, and what is the same for all of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from kdfast.data.augment import Augment, Draws, Mix
from kdfast.data.files import Files
from kdfast.data.tensors import ImageSet


class Request(NamedTuple):
    """One batch.

    Attributes:
        samples: [batch] int64, which images of the data set.
        seed, variant: of the augmentation, see `Draws`.
        mix: how its images are mixed, if they are.
    """

    samples: np.ndarray
    seed: int
    variant: int
    mix: Mix | None

    def draws(self) -> Draws:
        return Draws(self.seed, self.variant, self.samples)


@dataclass(frozen=True)
class Work:
    """What an engine does to every image of a stream.

    Attributes:
        data: the images.
        members: [images], sorted, those of them that the stream may give.
        mean, deviation: [channels, 1, 1] float32, subtracted and divided by.
        augment: the random changes.
        batch_size: images a batch at most.
        device: of the batches.
        workers: threads or processes.
    """

    data: ImageSet | Files
    members: np.ndarray
    mean: Tensor
    deviation: Tensor
    augment: Augment
    batch_size: int
    device: torch.device
    workers: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a batch."""
        return self.data.shape if isinstance(self.data, Files) else tuple(self.data.images.shape[1:])

    @property
    def shift(self) -> int:
        """Pixels that an image which keeps its size is padded by before it is cut."""
        return self.shape[1] // 8


class Engine(Protocol):
    """A back end: batches of images for requests, in their order.

    What it yields is on the device, float32 [batch, channels, height, width], decoded, augmented, normalised and mixed;
    beside it the samples that are in it, which differ from the request's where broken images were replaced.
    """

    def batches(self, requests: Iterable[Request]) -> Iterator[tuple[Tensor, np.ndarray]]: ...


def blend(images: Tensor, mix: Mix) -> Tensor:  # [batch, channels, height, width]
    """Each image mixed with the one before it; where a box is pasted, in place."""
    if mix.box is None:
        mixed, others = images.mul(mix.share), 1 - mix.share
        mixed[1:].add_(images[:-1], alpha=others)
        mixed[:1].add_(images[-1:], alpha=others)
        return mixed
    top, left, height, width = mix.box
    pasted = images[:, :, top : top + height, left : left + width]
    pasted.copy_(pasted.roll(1, 0))
    return images


def blend_targets(labels: Tensor, classes: int, mix: Mix) -> Tensor:
    """[batch, classes] probabilities of the images of `blend`."""
    hot = nn.functional.one_hot(labels, classes).float()
    return mix.share * hot + (1 - mix.share) * hot.roll(1, 0)


def cut_out(images: Tensor, squares: Tensor) -> Tensor:  # [batch, channels, height, width], [batch, 4]
    """Zero, in place, each image's square of `Draws.squares`."""
    top, left, bottom, right = squares.to(images.device)[:, :, None].unbind(1)  # [batch, 1]
    rows, columns = (torch.arange(size, device=images.device) for size in images.shape[2:])
    inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None]
    return images.masked_fill_(inside[:, None], 0.0)
