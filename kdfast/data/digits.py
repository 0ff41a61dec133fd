"""The 1,797 handwritten digits (8x8 grey pixels) that scikit-learn carries: real images without a download."""

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.data.tensors import ImageSet


class DigitsSplit(NamedTuple):
    """The three disjoint parts of the digits, and the value of an empty pixel after normalisation."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    background: float


def load_digits(train_per_class: int = 20, validation_per_class: int = 60) -> DigitsSplit:
    """The digits as ``[count, 1, 8, 8]`` images in a split that never changes; the test set is all that is left.

    The images of each class are put in one fixed random order: the first go to the training set, the next to the
    validation set. Pixels are normalised by the mean and deviation of the *training* images.

    Args:
        train_per_class: training images of each of the ten classes, >= 1.
        validation_per_class: validation images of each class, >= 0.

    Raises:
        ImportError: without scikit-learn, naming the command that installs it.
        ValueError: when less than one test image of a class would be left.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
    (doi:10.24432/C50P49); its test part, as `sklearn.datasets.load_digits` bundles it.

    Example:
        >>> split = load_digits(train_per_class=20, validation_per_class=60)
        >>> len(split.train.labels), len(split.validation.labels), len(split.test.labels)
        (200, 600, 997)
    """
    images, labels = raw_digits()
    train, validation, test = digit_parts(labels, train_per_class, validation_per_class)
    mean, deviation = images[train].mean(), images[train].std()
    data = ImageSet((images - mean) / deviation, labels)
    background = float(-mean / deviation)  # the paper's white: a raw 0
    return DigitsSplit(data.take(train), data.take(validation), data.take(test), background)


def raw_digits() -> tuple[Tensor, Tensor]:
    """All digits: [1797, 1, 8, 8] float32 whole numbers from 0 to 16, and [1797] labels."""
    try:
        from sklearn.datasets import load_digits as bundled_digits
    except ImportError as error:
        raise ImportError(
            "The digits come with scikit-learn, which is not installed; run: pip install scikit-learn"
        ) from error
    raw = bundled_digits()
    return torch.from_numpy(raw.images).float()[:, None], torch.from_numpy(raw.target).long()


def digit_parts(labels: Tensor, train_per_class: int, validation_per_class: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the digits belong to the three parts of `load_digits`."""
    fewest = int(labels.bincount().min())
    if train_per_class < 1 or validation_per_class < 0 or train_per_class + validation_per_class >= fewest:
        raise ValueError(
            f"train_per_class (>= 1) and validation_per_class (>= 0) must sum to less than {fewest}, the images of "
            f"the rarest digit, got {train_per_class} and {validation_per_class}."
        )
    generator = torch.Generator().manual_seed(1797)
    parts: tuple[list, list, list] = ([], [], [])
    for label in range(10):
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        cuts = (train_per_class, validation_per_class, len(members) - train_per_class - validation_per_class)
        for part, chosen in zip(parts, members.split(cuts), strict=True):
            part.append(chosen)
    train, validation, test = (torch.cat(part) for part in parts)
    return train, validation, test
