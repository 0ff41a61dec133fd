"""The resident back end: a data set kept once in memory, on the GPU if there is one, augmented as whole batches."""

import functools
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from kdfast.data.engines import Request, Work, blend, cut_out


class Resident:
    """Crop, flip, cutout, mixup, cutmix and normalisation, each a few operations on the batch.

    Raises:
        ValueError: for augmentations it does not have.
    """

    def __init__(self, work: Work):
        unable = [name for name in ("color", "randaugment") if getattr(work.augment, name)]
        if unable:
            raise ValueError(f"The resident loader has no {unable[0]}; take loader 'torchvision' or 'dali'.")
        self.work, self.images = work, work.data.images.to(work.device)
        self._scale = (1 / work.deviation).to(work.device)
        self._offset = (-work.mean / work.deviation).to(work.device)

    def batches(self, requests: Iterable[Request]) -> Iterator[tuple[Tensor, np.ndarray]]:
        for request in requests:
            yield self.batch(request), request.samples

    def batch(self, request: Request) -> Tensor:
        augment, draws, device = self.work.augment, request.draws(), self.images.device
        # Those that are to be mirrored come first until they are, so that they are one piece of memory.
        flips = draws.flips() if augment.flip else np.zeros(len(request.samples), bool)
        places, mirror = np.argsort(~flips, kind="stable"), int(flips.sum())
        images = self.images.index_select(0, torch.from_numpy(request.samples[places]).to(device))
        if augment.crop:
            top, left = (torch.from_numpy(x[places]).to(device) for x in draws.offsets(self.work.shift))
            images = shifted(images, self.work.shift, top, left)
        if mirror:
            images[:mirror] = images[:mirror].flip(-1)
            images = images.index_select(0, torch.from_numpy(np.argsort(places)).to(device))
        # A product takes half as long as a quotient; floats are the batch's own too, a copy of the set's.
        images = images.float().mul_(self._scale).add_(self._offset)
        if augment.cutout:
            images = cut_out(images, draws.squares(augment.cutout, *images.shape[2:]))
        return images if request.mix is None else blend(images, request.mix)


def shifted(images: Tensor, shift: int, top: Tensor, left: Tensor) -> Tensor:
    """[batch, channels, height, width] cut out of the images padded by `shift` with 0, at `top` and `left` [batch].

    A row of the result is `width` neighbours in memory, so that it is copied as a whole from where it begins: the view
    has a row for every place in memory, and they overlap.
    """
    padded = nn.functional.pad(images, (shift,) * 4)
    width, wide = images.shape[3], padded.shape[3]
    starts = _starts(tuple(images.shape[:3]), shift, wide, images.device) + (top * wide + left)[:, None, None]
    places = padded.reshape(-1).unfold(0, width, 1)  # [all - width + 1, width]
    return places.index_select(0, starts.reshape(-1)).reshape(images.shape)


@functools.lru_cache(maxsize=8)
def _starts(shape: tuple[int, int, int], shift: int, wide: int, device: torch.device) -> Tensor:
    """[batch, channels, height]: where the rows of a cut at the top left begin in padded images."""
    batch, channels, height = shape
    planes = torch.arange(batch * channels, device=device).reshape(batch, channels, 1)
    return (planes * (height + 2 * shift) + torch.arange(height, device=device)) * wide
