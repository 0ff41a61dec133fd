"""The resident back end: a data set kept once in memory, on the GPU if there is one, augmented as whole batches."""

import functools
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from kdfast import _native  # noqa: F401 (registers the CPU's kernel)
from kdfast.data.engines import Request, Work, blend, cut_out

TOGETHER = 32  # batches whose random numbers are drawn at once: most of what one batch's cost is calling numpy

LIB = torch.library.Library("kdfast", "FRAGMENT")
LIB.define(
    "augment_images(Tensor images, Tensor samples, Tensor corners, Tensor flips, int shift, Tensor scale, "
    "Tensor offset, Tensor? squares) -> Tensor"
)


class Resident:
    """Crop, flip, cutout, mixup, cutmix and normalisation, each of the whole batch.

    Raises:
        ValueError: for augmentations it does not have.
    """

    def __init__(self, work: Work):
        unable = [name for name in ("color", "randaugment") if getattr(work.augment, name)]
        if unable:
            raise ValueError(f"The resident loader has no {unable[0]}; take loader 'torchvision' or 'dali'.")
        images = work.data.images.to(work.device).contiguous()
        self.work, self.images = work, images if images.dtype == torch.uint8 else images.float()
        self._scale = (1 / work.deviation).flatten().to(work.device)
        self._offset = (-work.mean / work.deviation).flatten().to(work.device)

    def batches(self, requests: Iterable[Request]) -> Iterator[tuple[Tensor, np.ndarray]]:
        for _, alike in itertools.groupby(requests, lambda request: (request.seed, request.variant)):
            while group := list(itertools.islice(alike, TOGETHER)):
                yield from zip(self._made(group), (request.samples for request in group), strict=True)

    def _made(self, group: list[Request]) -> Iterator[Tensor]:
        """The batches of requests with one seed and variant."""
        augment, work = self.work.augment, self.work
        samples = np.concatenate([request.samples for request in group])
        draws, count = group[0]._replace(samples=samples).draws(), len(samples)
        corners, shift = np.zeros((count, 2), np.int64), 0
        if augment.crop:
            corners, shift = np.stack(draws.offsets(work.shift), 1), work.shift
        flips = draws.flips() if augment.flip else np.zeros(count, bool)
        squares = draws.squares(augment.cutout, *work.shape[1:]) if augment.cutout else None
        end = 0
        for request in group:
            own = slice(end, end := end + len(request.samples))
            images = torch.ops.kdfast.augment_images(
                self.images, *(torch.from_numpy(x[own]) for x in (samples, corners, flips)), shift, self._scale,
                self._offset, None if squares is None else torch.from_numpy(squares[own]),
            )  # fmt: skip
            yield images if request.mix is None else blend(images, request.mix)


def augment_images(
    images: Tensor,
    samples: Tensor,
    corners: Tensor,
    flips: Tensor,
    shift: int,
    scale: Tensor,
    offset: Tensor,
    squares: Tensor | None,
) -> Tensor:
    """A batch out of a set, cropped, mirrored, normalised and cut out: the definition, and what runs on a GPU.

    Args:
        images: [count, channels, height, width] uint8 or float32.
        samples: [batch] int64 on the CPU, as all that is drawn.
        corners: [batch, 2] int64, top and left of the cut out of an image padded by `shift` with 0.
        flips: [batch] bool, which are mirrored, once they are cut.
        scale, offset: [channels] float32, by which and to which is multiplied and added.
        squares: [batch, 4] int64, top, left, bottom and right of what is zeroed at last; None for nothing.

    Returns:
        [batch, channels, height, width] float32.
    """
    device, (_, channels, height, width) = images.device, images.shape
    if shift or flips.any():
        # Those that are mirrored come first for a while, so that they are one piece of memory.
        places, mirror, batch = (~flips).to(torch.uint8).argsort(stable=True), int(flips.sum()), len(samples)
        chosen = images.index_select(0, samples[places].to(device))
        high, wide = height + 2 * shift, width + 2 * shift
        padded = chosen.new_zeros(batch, channels, high, wide)
        inner = padded[:, :, shift : shift + height, shift : shift + width]
        inner[:mirror], inner[mirror:] = chosen[:mirror].flip(-1), chosen[mirror:]
        # A row of the result is `width` neighbours in memory, copied as a whole from where it begins: the view has a
        # row for every place in memory, and they overlap.
        left = torch.where(flips, 2 * shift - corners[:, 1], corners[:, 1])
        first = (places.argsort() * channels * high + corners[:, 0]) * wide + left  # [batch], of each cut's first row
        starts = first.to(device)[:, None] + _rows(channels, height, high, wide, device)
        chosen = padded.reshape(-1).unfold(0, width, 1).index_select(0, starts.reshape(-1))
        chosen = chosen.reshape(batch, channels, height, width)
    else:
        chosen = images.index_select(0, samples.to(device))
    # A product takes half as long as a quotient; floats are the batch's own too, a copy of the set's.
    chosen = chosen.float().mul_(scale[:, None, None]).add_(offset[:, None, None])
    return chosen if squares is None else cut_out(chosen, squares)


LIB.impl("augment_images", augment_images, "CompositeExplicitAutograd")


@functools.lru_cache(maxsize=8)
def _rows(channels: int, height: int, high: int, wide: int, device: torch.device) -> Tensor:
    """[channels * height]: where the rows of a cut at the top left of a padded image begin, from its first pixel."""
    planes = torch.arange(channels, device=device)[:, None] * high
    return ((planes + torch.arange(height, device=device)) * wide).flatten()
