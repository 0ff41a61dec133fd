"""Orders, splits, shares and places in the epoch: the same for every back end."""

import multiprocessing
import time
import warnings

import numpy as np
import pytest
import torch

from kdfast.data import ImageSet, Stream, loaders
from kdfast.data.dali import available
from kdfast.data.streams import ahead
from tests.data.images import pictures, write_folder

needs_dali = pytest.mark.skipif(not available(), reason="NVIDIA DALI is not installed")
LOADERS = ["resident", "torchvision", pytest.param("dali", marks=needs_dali)]


def stream(loader="resident", count=40, batch_size=8, data=None, **options):
    options = {"seed": 1, "augment": "crop_flip", "classes": 4, "workers": 0, **options}
    data = pictures(count, 16) if data is None else data
    return Stream(data, torch.zeros(3), torch.ones(3), batch_size, loader=loader, **options)


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True)
    )


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("augment", ["crop_flip", "crop_flip+cutout+mixup+cutmix"])
def test_goes_on_in_the_middle_of_an_epoch(loader, augment):
    whole = stream(loader, augment=augment)
    expected = [list(whole) for _ in range(3)]
    assert not same(expected[0], expected[1])
    for epoch, position in ((0, 0), (1, 2), (1, 5), (2, 4)):
        begun = stream(loader, augment=augment)
        batches = []
        for _ in range(epoch):
            list(begun)
        for batch in begun:
            if begun.state_dict()["position"] > position:
                break
            batches.append(batch)
            state = begun.state_dict()
            if len(batches) == position:
                break
        resumed = stream(loader, augment=augment)
        resumed.load_state_dict(state if position else {"epoch": epoch, "position": 0})
        batches += list(resumed)
        rest = expected[epoch] if position < 5 else expected[epoch] + expected[epoch + 1]
        assert same(batches, rest), (epoch, position)


@pytest.mark.parametrize("loader", LOADERS)
def test_the_global_random_state_has_no_part_and_is_left_alone(loader):
    first = list(stream(loader))
    torch.manual_seed(7), np.random.seed(7)
    before = torch.get_rng_state()
    assert same(first, list(stream(loader)))
    assert torch.equal(before, torch.get_rng_state())
    assert not same(first, list(stream(loader, seed=2)))


@pytest.mark.parametrize("loader", LOADERS)
def test_an_epoch_that_was_left_early_disturbs_no_later_one(loader):
    whole, left = stream(loader), stream(loader)
    expected = [list(whole) for _ in range(2)]
    next(iter(left))
    left.load_state_dict({"epoch": 1, "position": 0})
    assert same(list(left), expected[1])


def test_processes_share_an_order():
    one = stream(batch_size=8)
    two = [stream(batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(2):
        whole = [(one.samples.clone(), batch) for batch in one]
        parts = [[(s.samples.clone(), batch) for batch in s] for s in two]
        assert len(whole) == len(parts[0]) == len(parts[1]) == 5
        for (samples, (images, _)), *shares in zip(whole, *parts, strict=True):
            assert torch.equal(samples, torch.stack([share[0] for share in shares], 1).flatten())
            # An image is augmented alike, whoever sees it.
            assert torch.equal(images, torch.stack([share[1][0] for share in shares], 1).flatten(0, 1))


def test_variants_recur():
    s = stream(variants=2)
    epochs = []
    for _ in range(4):
        images = torch.empty(40, 3, 16, 16)
        for batch, _ in s:
            images[s.samples] = batch
        epochs.append((s.variant, images))
    assert [variant for variant, _ in epochs] == [0, 1, 0, 1]
    assert torch.equal(epochs[0][1], epochs[2][1]) and not torch.equal(epochs[0][1], epochs[1][1])


@pytest.mark.parametrize("loader", LOADERS)
def test_fixed_order_keeps_the_last_images(loader):
    s = stream(loader, count=21, seed=None)
    batches = list(s)
    assert [len(labels) for _, labels in batches] == [8, 8, 5] == [8, 8, len(s.indices)]
    assert torch.equal(torch.cat([images for images, _ in batches]), pictures(21, 16).images.float())
    assert same(batches, list(s))


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_splits_are_disjoint_balanced_and_repeat(share):
    streams, again, other = (
        loaders("digits", batch_size=50, validation=share, seed=seed, augment="crop_flip") for seed in (3, 3, 4)
    )
    kept, held = streams.train.members, streams.validation.members
    assert sorted(torch.cat([kept, held]).tolist()) == list(range(1000))
    assert streams.validation.labels.bincount().tolist() == [round(100 * share)] * 10
    assert torch.equal(again.validation.members, held) and not torch.equal(other.validation.members, held)
    assert streams.train.data is streams.validation.data  # one copy of the images
    for s in (streams.train, streams.validation):
        for _, labels in s:
            assert torch.equal(labels, s.data.labels[s.samples]) and torch.equal(labels, s.labels[s.indices])


def test_halves_are_fresh_and_leave_held_out_images_out():
    streams = loaders("digits", batch_size=50, validation=0.2, seed=3)
    first, second = streams.halves(0)
    assert sorted(torch.cat([first.members, second.members]).tolist()) == sorted(streams.train.members.tolist())
    assert len(first.members) == len(second.members) == 400
    assert not torch.equal(streams.halves(1)[0].members, first.members)
    assert torch.equal(streams.halves(0)[0].members, first.members)


def test_held_out_images_that_are_only_measured_are_neither_shuffled_nor_changed():
    options = {"batch_size": 64, "validation": 0.2, "augment": "crop_flip+mixup"}
    measured = loaders("digits", learns=False, **options).validation
    assert same(list(measured), list(measured))
    assert sum(len(labels) for _, labels in measured) == 200
    learned = loaders("digits", **options).validation
    assert not same(list(learned), list(learned))


@pytest.mark.parametrize("loader", LOADERS)
def test_mixed_targets_are_probabilities(loader):
    s = stream(loader, augment="mixup=1")
    for _, targets in s:
        assert targets.shape == (8, 4) and torch.allclose(targets.sum(1), torch.ones(8))
        others = s.labels[s.indices].roll(1)
        assert ((targets > 0).sum(1) == 2 - (others == s.labels[s.indices]).long()).all()


@pytest.mark.parametrize("loader", ["torchvision", pytest.param("dali", marks=needs_dali)])
def test_workers_change_nothing(loader, tmp_path):
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)  # on one core
    root = write_folder(tmp_path)
    given = [
        list(loaders(f"folder:{root}", batch_size=8, loader=loader, augment="crop_flip", size=32, workers=n).train)
        for n in (0, 2)
    ]
    assert same(*given)


def test_ahead_gives_everything_in_order_and_passes_errors_on():
    assert list(ahead(iter(range(10)), 2)) == list(range(10)) and list(ahead(iter([]), 2)) == []

    def broken():
        yield 1
        raise KeyError("two")

    def made(wanted):
        numbers = []
        counts = []
        for n in ahead(iter(numbers.append(n) or n for n in range(6)), 2, lambda: wanted(len(counts))):
            time.sleep(0.02)
            counts.append(len(numbers))
            assert n == len(counts) - 1
        return counts

    assert made(lambda step: True) == [3, 4, 5, 6, 6, 6]  # two are made while each is worked on
    assert made(lambda step: step > 0) == [1, 4, 5, 6, 6, 6]
    assert made(lambda step: False) == [1, 2, 3, 4, 5, 6]

    items = ahead(broken(), 2)
    assert next(items) == 1
    with pytest.raises(KeyError, match="two"):
        next(items)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"validation": 1.0}, r"validation must be a share of the training images in \[0, 1\), got 1.0"),
        ({"validation": "all"}, r"validation must be a share of the training images in \[0, 1\), got 'all'"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"batch_size": "many"}, "batch_size must be a whole number, got 'many'"),
        ({"augment": 5}, "augment must be 'none' or names of .* got 5"),
        ({"device": "gpu"}, "device must be one that this torch can use here, got 'gpu' "),
        ({"variants": 0}, "variants must be at least 1, got 0"),
        ({"loader": "fast"}, "loader must be one of 'auto', 'resident', 'dali', 'torchvision', got 'fast'"),
        ({"augment": "blur"}, "augment must be"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"size": 16}, "These images are kept at their own 8 x 8 pixels, got size 16"),
        ({"on_broken": "ignore"}, "on_broken must be one of 'stop', 'skip', got 'ignore'"),
        ({"broken_limit": 0}, "broken_limit must be at least 1, got 0"),
    ],
)
def test_impossible_options_are_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        loaders("digits", **{"batch_size": 8, **options})


def test_a_stream_of_nothing_is_one_sentence():
    with pytest.raises(ValueError, match="A stream needs at least one image, got none"):
        stream(members=torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"The data must be 'digits', 'cifar10:ROOT', .* got 'imagenet'"):
        loaders("imagenet", batch_size=8)


@pytest.mark.parametrize("loader", LOADERS)
def test_images_labels_and_statistics_that_do_not_go_together_are_one_sentence(loader):
    data = pictures(8, 16)
    grey = torch.zeros(8, 1, 16, 16, dtype=torch.uint8)
    for wrong in (data._replace(labels=data.labels[:5]), data._replace(images=grey), ImageSet(grey[:, 0], data.labels)):
        with pytest.raises(ValueError, match=r"A stream needs images \[count, channels, height, width\], a label for"):
            stream(loader, data=wrong)
    with pytest.raises(ValueError, match="targets are probabilities: say how many `classes` there are"):
        stream(loader, augment="mixup", classes=None)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on one core
def test_a_worker_that_is_killed_is_one_sentence_and_the_next_epoch_has_others():
    killed = stream("torchvision", workers=2)
    batches = iter(killed)
    next(batches)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(OSError, match=r"A worker process of the torchvision loader ended \(.*\): it was killed"):
        list(batches)
    killed.load_state_dict({"epoch": 0, "position": 0})
    assert same(list(killed), list(stream("torchvision")))


@pytest.mark.cuda
def test_resident_images_are_on_the_gpu_once():
    streams = loaders("digits", batch_size=50, validation=0.2, device="cuda", augment="crop_flip+cutout")
    assert streams.train.data.images.is_cuda
    assert streams.train._engine.images.data_ptr() == streams.validation._engine.images.data_ptr()
    cpu = loaders("digits", batch_size=50, validation=0.2, augment="crop_flip+cutout")
    for (images, labels), (others, _) in zip(streams.train, cpu.train, strict=True):
        assert images.is_cuda and labels.is_cuda
        # a GPU fuses the multiplication and the addition of the normalisation
        torch.testing.assert_close(images.cpu(), others, rtol=0, atol=1e-6)


def test_float_images_of_the_caller_are_untouched():
    data = ImageSet(torch.rand(8, 3, 4, 4), torch.arange(8) % 4)
    before = data.images.clone()
    list(Stream(data, torch.ones(3), torch.full((3,), 2.0), 4, seed=None, loader="resident"))
    assert torch.equal(data.images, before)
