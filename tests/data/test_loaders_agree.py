"""The three back ends against each other, on the same images with the same draws."""

import numpy as np
import pytest
import torch

from kdfast._torchvision import import_module
from kdfast.data import ImageSet, Stream, loaders
from kdfast.data import augment as augmenting
from kdfast.data.dali import Dali, available
from kdfast.data.engines import blend, blend_targets
from kdfast.data.vision import OPERATIONS
from tests.data.images import pictures, write_folder

needs_dali = pytest.mark.skipif(not available(), reason="NVIDIA DALI is not installed")
LOADERS = ["resident", pytest.param("dali", marks=needs_dali)]
MEAN, DEVIATION = torch.tensor([120.0, 121.0, 122.0]), torch.tensor([60.0, 61.0, 62.0])


def batches(loader, augment, data=None, **options):
    data = pictures() if data is None else data
    channels = data.images.shape[1]
    options = {"seed": 3, "classes": 4, "workers": 0, **options}
    return list(Stream(data, MEAN[:channels], DEVIATION[:channels], 10, augment=augment, loader=loader, **options))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "augment", ["none", "crop_flip", "crop_flip+cutout=0.5", "mixup", "cutmix", "crop_flip+cutout+mixup+cutmix"]
)
def test_batches_are_equal(loader, augment):
    expected, given = batches("torchvision", augment), batches(loader, augment)
    assert len(expected) == len(given) == 4
    for (images, targets), (others, other_targets) in zip(expected, given, strict=True):
        assert images.shape == (10, 3, 32, 32) and images.dtype == torch.float32
        assert torch.equal(targets, other_targets)
        # Both multiply by 1/deviation instead of dividing: a few units in the last place of numbers up to 2.2.
        torch.testing.assert_close(others, images, rtol=0, atol=1e-6)
    assert torch.equal(
        torch.cat([y for _, y in expected]).sum(0).round(), torch.cat([y for _, y in given]).sum(0).round()
    )


@pytest.mark.parametrize("loader", ["torchvision", *LOADERS])
def test_crop_and_flip_are_what_they_say(loader):
    """By hand, pixel for pixel, in whole numbers: mean 0, deviation 1."""
    data = pictures(20)
    stream = Stream(data, torch.zeros(3), torch.ones(3), 20, seed=5, augment="crop_flip", loader=loader, workers=0)
    ((images, labels),) = stream
    draws = augmenting.Draws(5, 0, stream.samples.numpy())
    (top, left), flips = draws.offsets(4), draws.flips()
    assert torch.equal(labels, data.labels[stream.samples])
    padded = torch.zeros(20, 3, 40, 40)
    padded[:, :, 4:36, 4:36] = data.images[stream.samples].float()
    for place, image in enumerate(images):
        cut = padded[place, :, top[place] : top[place] + 32, left[place] : left[place] + 32]
        assert torch.equal(image, cut.flip(-1) if flips[place] else cut)
    assert 0 < flips.sum() < 20


@pytest.mark.parametrize("loader", ["torchvision", *LOADERS])
def test_other_shapes(loader):
    grey = ImageSet(torch.arange(12 * 10 * 14, dtype=torch.uint8).reshape(12, 1, 10, 14), torch.arange(12) % 4)
    floats = ImageSet(torch.rand(12, 3, 9, 11) * 255, torch.arange(12) % 4)
    for data in (grey, floats):
        expected, given = (batches(name, "crop_flip", data) for name in ("torchvision", loader))
        # As in test_batches_are_equal: 1/deviation is multiplied by.
        torch.testing.assert_close(given[0][0], expected[0][0], rtol=0, atol=1e-6)


@needs_dali
def test_colors_agree_to_rounding():
    """Torchvision cuts brightness, contrast and saturation each to whole numbers, DALI rounds: below 4 of 255."""
    expected, given = batches("torchvision", "crop_flip+color"), batches("dali", "crop_flip+color")
    plain = batches("torchvision", "crop_flip")
    errors, effects = [], []
    for (images, _), (others, _), (before, _) in zip(expected, given, plain, strict=True):
        errors.append((images - others).abs() * 60)
        effects.append((images - before).abs() * 60)
    assert torch.cat(errors).max() < 4.5 and torch.cat(errors).mean() < 2
    assert torch.cat(effects).mean() > 10


# Mean difference that is allowed, of 255: none for geometry, which takes the nearest pixel, and for whole numbers;
# else below 1, as torchvision cuts numbers off where DALI rounds; equalize is PIL's there, OpenCV's here, which take
# other quantiles (measured: 11.7).
EXACT = {"identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "posterize", "solarize"}
LOOSE = {"equalize": 20.0}


@needs_dali
@pytest.mark.parametrize("turned", [False, True])
def test_randaugments_operations_agree(monkeypatch, turned):
    """Every operation by itself, both ways: one image each, the second layer the identity."""
    count = len(OPERATIONS)
    flat = pictures(count)
    data = ImageSet((0.6 * flat.images + 30).to(torch.uint8), flat.labels)  # so that contrast can be stretched

    def one_each(draws, kinds):
        assert kinds == count
        samples = draws._samples.astype(np.int64)
        return np.stack([samples, np.zeros_like(samples)], 1), np.full((len(samples), 2), turned)

    monkeypatch.setattr(augmenting.Draws, "operations", one_each)
    results = []
    for loader in ("torchvision", "dali"):
        stream = Stream(
            data, torch.zeros(3), torch.ones(3), count, seed=0, augment="randaugment=15", loader=loader, workers=0
        )
        ((images, _),) = stream
        results.append(images[stream.samples.argsort()])
    for name, ours, theirs, before in zip(OPERATIONS, *results, data.images.float(), strict=True):
        difference = (ours - theirs).abs().mean().item()
        assert difference <= (0 if name in EXACT else LOOSE.get(name, 1.0)), name
        assert name == "identity" or (ours - before).abs().mean() > 0.05, name


def test_randaugment_is_torchvisions_in_distribution():
    """Mean and spread of what the operations do to the pixels, over many draws, against v2.RandAugment itself."""
    v2 = import_module("torchvision.transforms.v2")
    image = pictures(1).images
    count = 600
    data = ImageSet(image.expand(count, -1, -1, -1).contiguous(), torch.arange(count) % 4)
    stream = Stream(
        data, torch.zeros(3), torch.ones(3), count, seed=0, augment="randaugment", loader="torchvision", workers=0
    )
    ((ours, _),) = stream
    torch.manual_seed(0)
    theirs = torch.stack([v2.RandAugment(2, 9)(image[0]) for _ in range(count)]).float()
    effects = [(x - image.float()).abs().mean((1, 2, 3)) for x in (ours, theirs)]
    error = torch.stack([x.var() for x in effects]).sum().div(count).sqrt()
    assert (effects[0].mean() - effects[1].mean()).abs() < 4 * error
    assert effects[0].std() == pytest.approx(effects[1].std().item(), rel=0.15)


@needs_dali
@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_jpegs_of_all_sizes_agree(tmp_path, augment):
    """Decoding is the same to the bit; resizing rounds PIL's way or DALI's: at most 3 of 255, 0.2 on average."""
    root = write_folder(tmp_path)
    parts = {}
    for loader in ("torchvision", "dali"):
        streams = loaders(f"folder:{root}", batch_size=8, seed=1, loader=loader, augment=augment, size=64, workers=0)
        assert streams.shape == (3, 64, 64) and streams.classes == 3
        parts[loader] = [*streams.train, *streams.test]
    for (images, labels), (others, other_labels) in zip(*parts.values(), strict=True):
        assert torch.equal(labels, other_labels)
        difference = (images - others).abs() * 58
        assert difference.max() < 3.5 and difference.mean() < 0.25


@needs_dali
def test_small_images_in_files_keep_their_size(tmp_path):
    """As in memory: PNGs lose nothing, so the resident loader is matched to rounding too."""
    root = write_folder(tmp_path, sides=(40,), suffix=".png")
    given = {}
    for loader in ("resident", "torchvision", "dali"):
        streams = loaders(f"folder:{root}", batch_size=8, seed=1, loader=loader, augment="crop_flip", workers=0)
        assert streams.shape == (3, 40, 40) and streams.train.loader == loader
        mean, deviation = streams.train.work.mean, streams.train.work.deviation
        given[loader] = [images * deviation + mean for images, _ in streams.train]
    for images, others, more in zip(*given.values(), strict=True):
        # The same rounding, of numbers up to 255 once the normalisation is undone.
        torch.testing.assert_close(images, others, rtol=0, atol=1e-4)
        torch.testing.assert_close(images, more, rtol=0, atol=1e-4)


def test_mixtures_by_hand():
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])
    mixed = blend(images, augmenting.Mix(0.75, None))
    torch.testing.assert_close(mixed[1], 0.75 * images[1] + 0.25 * images[0])
    pasted = blend(images.clone(), augmenting.Mix(0.75, (2, 1, 4, 4)))
    assert torch.equal(pasted[0, :, 2:6, 1:5], images[3, :, 2:6, 1:5]) and torch.equal(
        pasted[0, :, :2], images[0, :, :2]
    )
    targets = blend_targets(labels, 3, augmenting.Mix(0.75, None))
    assert targets.tolist() == [[0.75, 0.25, 0], [0.25, 0.75, 0], [0, 0.25, 0.75], [0, 0.75, 0.25]]


def test_what_the_resident_loader_lacks_is_one_sentence_and_another_is_chosen():
    for name in ("color", "randaugment"):
        with pytest.raises(ValueError, match=f"The resident loader has no {name}; take loader 'torchvision' or 'dali'"):
            batches("resident", name)
    stream = Stream(pictures(), MEAN, DEVIATION, 10, seed=0, augment="color", workers=0)
    assert stream.loader == ("dali" if available() else "torchvision")
    assert Stream(pictures(), MEAN, DEVIATION, 10, seed=0, augment="crop_flip").loader == "resident"


def test_without_dali_its_command_is_named(monkeypatch):
    monkeypatch.setattr("kdfast.data.dali.available", lambda: False)
    with pytest.raises(ImportError, match="pip install nvidia-dali-cuda120"):
        batches("dali", "none")


@needs_dali
def test_colors_of_grey_images_are_one_sentence():
    grey = ImageSet(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4))
    with pytest.raises(ValueError, match="color needs images of 3 channels, got 1"):
        batches("dali", "color", grey)


@pytest.mark.cuda
@needs_dali
@pytest.mark.parametrize("augment", ["none", "crop_flip+color+randaugment+cutout+mixup+cutmix"])
def test_gpu_pipelines(tmp_path, augment):
    """They compile and run on the GPU; nvJPEG decodes within a few of 255 of libjpeg."""
    root = write_folder(tmp_path)
    options = {"batch_size": 8, "seed": 1, "augment": augment, "size": 64}
    gpu = loaders(f"folder:{root}", loader="dali", device="cuda", **options)
    cpu = loaders(f"folder:{root}", loader="dali", **options)
    assert isinstance(gpu.train._engine, Dali)
    for (images, labels), (others, other_labels) in zip(gpu.train, cpu.train, strict=True):
        assert images.is_cuda and torch.equal(labels.cpu(), other_labels)
        assert (images.cpu() - others).abs().mean() * 58 < 6
    memory = batches("dali", "crop_flip", device="cuda")
    torch.testing.assert_close(memory[0][0].cpu(), batches("resident", "crop_flip")[0][0], rtol=0, atol=1e-5)
