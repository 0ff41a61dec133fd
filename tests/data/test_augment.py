import numpy as np
import pytest
import torch

from kdfast._torchvision import import_module
from kdfast.data.augment import Augment, Draws, draw_mix


def test_numbers_depend_on_the_image_and_not_on_its_batch():
    whole = Draws(3, 5, np.arange(100))
    part = Draws(3, 5, np.array([70, 7]))
    for purpose in range(6):
        assert np.array_equal(whole.uniform(purpose, 4)[[70, 7]], part.uniform(purpose, 4))
    assert not np.array_equal(Draws(3, 6, np.arange(100)).flips(), whole.flips())
    assert not np.array_equal(Draws(4, 5, np.arange(100)).flips(), whole.flips())


def test_numbers_are_uniform_and_independent():
    draws = [Draws(0, variant, np.arange(20_000)) for variant in range(2)]
    columns = [d.uniform(purpose, 2) for d in draws for purpose in range(3)]
    x = np.concatenate(columns, 1)  # [images, 12]
    # 20,000 numbers: a share of a tenth is off by 0.0021, a correlation by 0.007; five of these are allowed.
    counts = np.stack([np.histogram(column, 10, (0, 1))[0] for column in x.T]) / len(x)
    assert abs(counts - 0.1).max() < 0.0106
    correlations = np.corrcoef(np.concatenate([x, np.roll(x, 1, 0)], 1).T)
    assert abs(correlations - np.eye(len(correlations))).max() < 0.035


def test_every_offset_and_flip_comes():
    draws = Draws(1, 0, np.arange(5000))
    top, left = draws.offsets(4)
    assert set(top) == set(left) == set(range(9)) and abs(draws.flips().mean() - 0.5) < 0.03
    assert all(set(x) == {0} for x in draws.offsets(0))


@pytest.mark.parametrize("size", [(230, 300), (40, 400), (300, 60)])
def test_boxes_are_distributed_as_torchvisions(size):
    height, width = size
    count = 3000
    ours = Draws(2, 0, np.arange(count)).boxes(np.full(count, height), np.full(count, width))
    v2 = import_module("torchvision.transforms.v2")
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    crop = v2.RandomResizedCrop(8)
    drawn = [crop.make_params([image]) for _ in range(count)]
    theirs = np.array([[d["top"], d["left"], d["height"], d["width"]] for d in drawn])
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] > 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= size).all()
    error = np.sqrt((ours.var(0) + theirs.var(0)) / count)  # of the difference of the means
    assert (abs(ours.mean(0) - theirs.mean(0)) <= 4.5 * error).all()
    assert (abs(ours.std(0) - theirs.std(0)) <= 0.08 * theirs.std(0)).all()


def test_colors_squares_and_operations_are_in_their_ranges():
    draws = Draws(0, 0, np.arange(4000))
    colors = draws.colors(0.4)
    assert colors.min() > 0.6 and colors.max() < 1.4 and (abs(colors.mean(0) - 1) < 0.02).all()
    squares = draws.squares(0.5, 32, 32)
    sides = squares[:, 2:] - squares[:, :2]
    assert squares.min() == 0 and squares.max() == 32 and sides.max() == 16 and sides.min() == 8
    chosen, turned = draws.operations(14)
    assert set(chosen.flatten()) == set(range(14)) and abs(turned.mean() - 0.5) < 0.03


def test_mixtures():
    assert draw_mix(Augment.parse("crop_flip"), (0, 0), 32, 32) is None
    mixup = [draw_mix(Augment.parse("mixup=1"), (0, n), 32, 32) for n in range(500)]
    assert all(mix.box is None for mix in mixup)
    assert abs(np.mean([mix.share for mix in mixup]) - 0.5) < 0.06  # Beta(1, 1): 0.5 ± 0.013
    cutmix = [draw_mix(Augment.parse("cutmix"), (0, n), 32, 24) for n in range(500)]
    for share, (top, left, height, width) in cutmix:
        assert 0 <= top <= top + height <= 32 and 0 <= left <= left + width <= 24
        assert share == pytest.approx(1 - height * width / (32 * 24))
    both = [draw_mix(Augment.parse("mixup+cutmix"), (0, n), 32, 32) for n in range(200)]
    assert 60 < sum(mix.box is None for mix in both) < 140


def test_names_and_numbers():
    assert Augment.parse("none") == Augment()
    assert Augment.parse("crop_flip") == Augment(crop=1, flip=1)
    assert Augment.parse("crop+randaugment+cutout=0.5") == Augment(crop=1, randaugment=9, cutout=0.5)
    assert Augment.parse("mixup").mixes and not Augment.parse("crop_flip+color").mixes


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("blur", "augment must be 'none' or names of crop, flip, .* joined by '\\+', .* got 'blur'"),
        ("crop_flip+mixup=much", "got 'crop_flip\\+mixup=much'"),
        ("", "got ''"),
        ("cutout=2", r"augment's cutout must be in \(0, 1\], got 2.0"),
        ("randaugment=31", r"augment's randaugment must be in \(0, 30\], got 31.0"),
        ("mixup=nan", "augment's mixup must be in"),
    ],
)
def test_impossible_augmentations_are_one_sentence(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        Augment.parse(text)
