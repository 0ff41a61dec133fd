"""The torchvision back end: v2 transforms of one image after another, in the worker processes of a DataLoader."""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdfast._torchvision import import_module
from kdfast.data.augment import BINS, LAYERS, Draws
from kdfast.data.engines import Request, Work, blend, cut_out
from kdfast.data.files import Files, decoded, inner_boxes

# RandAugment's operations, in torchvision's order; the DALI back end has the same.
OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "auto_contrast", "equalize",
)  # fmt: skip


class Vision:
    """A DataLoader that is kept, with its workers, from epoch to epoch."""

    def __init__(self, work: Work):
        self.work = work
        self._requests: list[Request] = []  # of the epoch; the loader keeps this very list
        self._loader = self._started()

    def _started(self) -> DataLoader:
        return DataLoader(
            _Batches(self.work),
            batch_size=None,  # the set gives whole batches
            sampler=self._requests,
            num_workers=self.work.workers,
            persistent_workers=self.work.workers > 0,
            pin_memory=self.work.device.type == "cuda",
            generator=torch.Generator(),  # its workers' seeds leave the global random state alone
        )

    def batches(self, requests: Iterable[Request]) -> Iterator[tuple[Tensor, np.ndarray]]:
        self._requests[:] = requests
        data = self.work.data
        for images, samples, broken in self._given():
            for sample, reason in broken:
                data.mark(sample, reason)
            if not len(images):
                raise ValueError("None of the images of this part can be read.")
            yield images.to(self.work.device, non_blocking=True), samples.numpy()

    def _given(self) -> Iterator[tuple[Tensor, Tensor, list[tuple[int, str]]]]:
        try:
            yield from self._loader
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            self._loader = self._started()  # the one without its workers is of no more use
            raise ChildProcessError(
                f"A worker process of the torchvision loader ended ({str(error).splitlines()[0]}): it was killed, or "
                "memory ran out; go on from the last checkpoint, with fewer workers if it happens again."
            ) from error


class _Batches(Dataset):
    """Whole batches, and (sample, reason) of every broken image that was met: raising is the main process's."""

    def __init__(self, work: Work):
        self.work = work
        self.normalize = import_module("torchvision.transforms.v2.functional").normalize

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
        work, augment, broken = self.work, self.work.augment, []
        if isinstance(work.data, Files):
            pictures, samples = self._read(request.samples, broken)
            if not pictures:
                return torch.empty(0), torch.from_numpy(samples), broken
        else:
            samples = request.samples
            pictures = list(work.data.images[torch.from_numpy(samples)])
        draws = request._replace(samples=samples).draws()  # of those that are there, as what is cached of an image
        images = torch.stack(self._transformed(pictures, draws)).float()
        images = self.normalize(images, work.mean.flatten().tolist(), work.deviation.flatten().tolist(), inplace=True)
        if augment.cutout:
            images = cut_out(images, torch.from_numpy(draws.squares(augment.cutout, *images.shape[2:])))
        return images if request.mix is None else blend(images, request.mix), torch.from_numpy(samples), broken

    def _read(self, wanted: np.ndarray, broken: list[tuple[int, str]]) -> tuple[list, np.ndarray]:
        data, members = self.work.data, self.work.members
        pictures, samples = [], data.readable(wanted, members).copy()
        for place in range(len(samples)):
            for _ in range(len(members)):
                sample = int(samples[place])
                try:
                    pictures.append(decoded(data.read(sample)))
                    break
                except OSError as error:
                    broken.append((sample, str(error)))
                    samples[place] = members[(np.searchsorted(members, sample) + 1) % len(members)]
            else:
                return [], samples
        return pictures, samples

    def _transformed(self, pictures: list, draws: Draws) -> list[Tensor]:
        """uint8 (or float) [channels, height, width] of each picture: cropped, mirrored, coloured."""
        v2 = import_module("torchvision.transforms.v2.functional")
        work, augment, count = self.work, self.work.augment, len(pictures)
        files = isinstance(work.data, Files)
        if files and work.data.resize:
            heights, widths = np.array([(picture.height, picture.width) for picture in pictures]).T
            size = work.shape[1]
            if augment.crop:
                boxes = draws.boxes(heights, widths).tolist()
                pictures = [v2.resized_crop(p, *box, [size, size]) for p, box in zip(pictures, boxes, strict=True)]
            else:
                scaled, corners = (x.tolist() for x in inner_boxes(heights, widths, size))
                pictures = [
                    v2.crop(v2.resize(p, to), *corner, size, size)
                    for p, to, corner in zip(pictures, scaled, corners, strict=True)
                ]
        if files:
            pictures = [v2.pil_to_tensor(picture) for picture in pictures]
        if augment.crop and not (files and work.data.resize):
            height, width = pictures[0].shape[-2:]
            corners = zip(*(x.tolist() for x in draws.offsets(work.shift)), strict=True)
            pictures = [
                v2.crop(v2.pad(p, [work.shift]), top, left, height, width)
                for p, (top, left) in zip(pictures, corners, strict=True)
            ]
        flips = draws.flips() if augment.flip else [False] * count
        pictures = [v2.horizontal_flip(p) if flip else p for p, flip in zip(pictures, flips, strict=True)]
        if augment.color:
            for place, (brightness, contrast, saturation) in enumerate(draws.colors(augment.color).tolist()):
                picture = v2.adjust_contrast(v2.adjust_brightness(pictures[place], brightness), contrast)
                pictures[place] = v2.adjust_saturation(picture, saturation)
        if augment.randaugment:
            chosen, turned = draws.operations(len(OPERATIONS))
            for place in range(count):
                for layer in range(LAYERS):
                    sign = -1 if turned[place, layer] else 1
                    name = OPERATIONS[chosen[place, layer]]
                    pictures[place] = operate(v2, name, pictures[place], augment.randaugment, sign)
        return pictures


def operate(v2, name: str, image: Tensor, magnitude: float, sign: int) -> Tensor:
    """One of RandAugment's operations at a magnitude of 0..30; torchvision's ranges, and nearest pixels on black."""
    part = round(magnitude) / (BINS - 1)
    height, width = image.shape[-2:]
    affine = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    if name in ("shear_x", "shear_y"):
        slope = -math.degrees(math.atan(sign * 0.3 * part))  # its angles run the other way round than DALI's
        shear = [slope, 0.0] if name == "shear_x" else [0.0, slope]
        return v2.affine(image, **{**affine, "shear": shear}, center=[0, 0])
    if name in ("translate_x", "translate_y"):
        moved = [int(sign * 150 / 331 * part * width), 0] if name == "translate_x" else None
        return v2.affine(image, **{**affine, "translate": moved or [0, int(sign * 150 / 331 * part * height)]})
    factor = 1 + sign * 0.9 * part
    return {
        "identity": lambda: image,
        "rotate": lambda: v2.rotate(image, sign * 30 * part),
        "brightness": lambda: v2.adjust_brightness(image, factor),
        "color": lambda: v2.adjust_saturation(image, factor),
        "contrast": lambda: v2.adjust_contrast(image, factor),
        "sharpness": lambda: v2.adjust_sharpness(image, factor),
        "posterize": lambda: v2.posterize(image, 8 - round(4 * part)),
        "solarize": lambda: v2.solarize(image, 255 * (1 - part)),
        "auto_contrast": lambda: v2.autocontrast(image),
        "equalize": lambda: v2.equalize(image),
    }[name]()
