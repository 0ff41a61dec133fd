"""What is done at random to training images, and the numbers that are drawn for it.

Every number is a function of (seed, variant, image, purpose) alone: it depends on no batch, process, thread or back
end. So every loader draws the same ones, and an epoch can be entered anywhere.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

LAYERS, BINS = 2, 31  # of RandAugment: operations an image, magnitudes to choose from
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Augment:
    """The random changes of training images, in the order in which they are made; 0 leaves one out.

    Attributes:
        crop: images of their own size: padded by an eighth of the height with black and cut at random (4 of 32
            pixels); images that are resized: a random part of 8 to 100 % of the area, aspect ratio 3/4 to 4/3.
        flip: mirrored in half the cases.
        color: brightness, contrast, then saturation, each times a factor in [1 - color, 1 + color]; below 1.
        randaugment: RandAugment's magnitude M of 0..30, with two operations an image.
        cutout: a square of the mean colour, its side this share of the height, centred anywhere.
        mixup: alpha of Beta(alpha, alpha), the share of another image of the batch.
        cutmix: the same for the share of the area that comes from another image. With both, one or the other.

    Source: crop and flip of CIFAR: He et al., CVPR 2016; of ImageNet: Szegedy et al., CVPR 2015. Cubuk et al.,
    "RandAugment", 2019 (arXiv:1909.13719). DeVries and Taylor, "Cutout", 2017 (arXiv:1708.04552). Zhang et al.,
    "mixup", ICLR 2018 (arXiv:1710.09412). Yun et al., "CutMix", ICCV 2019 (arXiv:1905.04899).
    """

    crop: float = 0
    flip: float = 0
    color: float = 0
    randaugment: float = 0
    cutout: float = 0
    mixup: float = 0
    cutmix: float = 0

    @classmethod
    def parse(cls, text: str) -> "Augment":
        """From "none", or names joined by "+", each with a number or its default: "crop_flip+cutout=0.5+mixup".

        Raises:
            ValueError: for an unknown name or an impossible number; one sentence.
        """
        values: dict[str, float] = {}
        for part in str(text).replace("crop_flip", "crop+flip").split("+") if text != "none" else ():
            name, sign, number = part.partition("=")
            try:
                value = float(number) if sign else _DEFAULTS[name]
                low, high = _RANGES[name]
            except (KeyError, ValueError):
                names = ", ".join(field.name for field in fields(cls))
                raise ValueError(
                    f"augment must be 'none' or names of {names} joined by '+', each perhaps with '=NUMBER', got "
                    f"{text!r}."
                ) from None
            if not low < value <= high:
                raise ValueError(f"augment's {name} must be in ({low}, {high}], got {value}.")
            values[name] = value
        return cls(**values)

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed, so that targets become probabilities."""
        return bool(self.mixup or self.cutmix)


_DEFAULTS = {"crop": 1, "flip": 1, "color": 0.4, "randaugment": 9, "cutout": 0.25, "mixup": 0.2, "cutmix": 1}
_RANGES = {
    "crop": (0, 1), "flip": (0, 1), "color": (0, 0.999), "randaugment": (0, BINS - 1), "cutout": (0, 1),
    "mixup": (0, 100), "cutmix": (0, 100),
}  # fmt: skip


class Mix(NamedTuple):
    """How the images of one batch are mixed, each with the one before it.

    Attributes:
        share: of an image's own in its pixels (mixup) or area (cutmix), and in its target.
        box: (top, left, height, width) that comes from the other image; None for mixup.
    """

    share: float
    box: tuple[int, int, int, int] | None


class Draws:
    """The random numbers of a batch.

    Args:
        seed: of the training.
        variant: of the augmentation: the epoch, or what recurs in its place.
        samples: [batch] which images, by their index in the whole set.
    """

    def __init__(self, seed: int, variant: int, samples: np.ndarray):
        self._key = _mixed(_mixed(seed & _MASK) ^ (variant & _MASK))
        self._samples = np.asarray(samples).astype(np.uint64)

    def uniform(self, purpose: int, count: int = 1) -> np.ndarray:
        """[batch, count] float64 in [0, 1), always the same for one purpose."""
        counters = (self._samples[:, None] << np.uint64(8)) + np.arange(count, dtype=np.uint64)
        keyed = counters * np.uint64(_GOLDEN) + np.uint64(_mixed(self._key ^ (purpose + 1)))
        return (_mixed_array(keyed) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def offsets(self, shift: int) -> tuple[np.ndarray, np.ndarray]:
        """Top and left [batch] of the cut out of an image padded by `shift`, in 0..2 shift."""
        return tuple((self.uniform(0, 2) * (2 * shift + 1)).astype(np.int64).T)

    def flips(self) -> np.ndarray:
        """[batch] bool."""
        return self.uniform(1)[:, 0] < 0.5

    def boxes(self, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """[batch, 4]: top, left, height, width of a random part of images of these sizes.

        As torchvision's RandomResizedCrop: the first of ten tries that fits, else the largest centred part of an
        allowed aspect ratio.
        """
        tries = 10
        u = self.uniform(2, 2 * tries + 2)
        heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
        area = (heights * widths)[:, None] * (0.08 + 0.92 * u[:, :tries])
        low, high = np.log(3 / 4), np.log(4 / 3)
        ratio = np.exp(low + (high - low) * u[:, tries : 2 * tries])
        w, h = np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
        first, rows = fits.argmax(1), np.arange(len(w))
        # The way out for images so long or so thin that no try fits.
        whole = widths / heights
        spare_w = np.where(whole > 4 / 3, np.rint(heights * 4 / 3), widths).astype(np.int64)
        spare_h = np.where(whole < 3 / 4, np.rint(widths / (3 / 4)), heights).astype(np.int64)
        found = fits.any(1)
        w, h = np.where(found, w[rows, first], spare_w), np.where(found, h[rows, first], spare_h)
        top, left = heights - h, widths - w
        place = u[:, 2 * tries :]
        top = np.where(found, (place[:, 0] * (top + 1)).astype(np.int64), top // 2)
        left = np.where(found, (place[:, 1] * (left + 1)).astype(np.int64), left // 2)
        return np.stack([top, left, h, w], 1)

    def colors(self, strength: float) -> np.ndarray:
        """[batch, 3] float32 factors of brightness, contrast and saturation."""
        return (1 + strength * (2 * self.uniform(3, 3) - 1)).astype(np.float32)

    def operations(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """RandAugment's operations [batch, LAYERS], of `count`, and whether each is turned round [batch, LAYERS]."""
        u = self.uniform(4, 2 * LAYERS)
        return (u[:, :LAYERS] * count).astype(np.int64), u[:, LAYERS:] < 0.5

    def squares(self, share: float, height: int, width: int) -> np.ndarray:
        """[batch, 4]: top, left, bottom, right of cutout's square within the image."""
        side = max(round(share * height), 1)
        centre = (self.uniform(5, 2) * (height, width)).astype(np.int64)
        corner = centre - side // 2
        return np.concatenate([corner, corner + side], 1).clip(0, (height, width, height, width))


def draw_mix(augment: Augment, seeds: tuple[int, ...], height: int, width: int) -> Mix | None:
    """How a batch is mixed, from `seeds` that name the batch; None where it is not."""
    if not augment.mixes:
        return None
    generator = np.random.default_rng(seeds)
    cut = bool(augment.cutmix) and (not augment.mixup or generator.random() < 0.5)
    alpha = augment.cutmix if cut else augment.mixup
    share = float(generator.beta(alpha, alpha))
    if not cut:
        return Mix(share, None)
    side = np.sqrt(1 - share)
    centre, half = generator.integers((height, width)), (side * np.array([height, width]) / 2).astype(np.int64)
    start, end = (centre - half).clip(0), np.minimum(centre + half, (height, width))
    h, w = (int(x) for x in end - start)
    return Mix(1 - h * w / (height * width), (int(start[0]), int(start[1]), h, w))


def _mixed(x: int) -> int:
    """SplitMix64's output function: Steele, Lea and Flood, OOPSLA 2014."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mixed_array(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
