import sys

import pytest
import torch

from kdfast.data import load_digits


def identities(*parts):
    """Each image as the tuple of its pixels, over all parts."""
    return [tuple(image.flatten().tolist()) for part in parts for image in part.images]


def test_split_is_disjoint_complete_and_balanced():
    split = load_digits(train_per_class=20, validation_per_class=60)
    assert len(split.train.labels) == 200 and len(split.validation.labels) == 600
    assert split.train.labels.bincount().tolist() == [20] * 10
    assert split.validation.labels.bincount().tolist() == [60] * 10
    everything = identities(split.train, split.validation, split.test)
    # No two of the 1,797 images are equal, so equal counts mean that no image is in two parts and none is lost.
    assert len(everything) == 1797 and len(set(everything)) == 1797


def test_split_never_changes():
    first = load_digits()
    torch.manual_seed(7)  # the global generator has no part in it
    second = load_digits()
    assert all(torch.equal(a.images, b.images) for a, b in zip(first[:3], second[:3], strict=True))
    # Pinned: a scikit-learn or torch that shuffled otherwise would silently move every published number.
    ink = [part.images[:50] - first.background for part in first[:3]]
    assert [int((16 * i / i.max()).round().sum()) for i in ink] == [15690, 15952, 15894]  # raw pixels are 0..16


def test_pixels_are_normalised_by_the_training_images_and_the_background_is_empty():
    split = load_digits(train_per_class=20, validation_per_class=60)
    images = split.train.images
    assert images.shape == (200, 1, 8, 8) and images.dtype == torch.float32
    assert split.train.labels.dtype == torch.int64
    assert abs(images.mean()) < 1e-5 and abs(images.std() - 1) < 1e-5
    assert images.min().item() == pytest.approx(split.background, abs=1e-6)


@pytest.mark.parametrize("counts", [(0, 10), (10, -1), (100, 74), (400, 0)])
def test_impossible_split_is_one_sentence(counts):
    with pytest.raises(ValueError, match="must sum to less than 174, the images of the rarest digit, got"):
        load_digits(*counts)


def test_missing_scikit_learn_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        load_digits()
