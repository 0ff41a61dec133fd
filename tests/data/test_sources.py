"""Data sets on the disk: found, read, refused."""

import shutil
import warnings

import numpy as np
import pytest
import torch

from kdfast._torchvision import import_module
from kdfast.data import loaders
from kdfast.data.dali import available
from tests.data.images import pictures, write_cifar100, write_folder, write_image

needs_dali = pytest.mark.skipif(not available(), reason="NVIDIA DALI is not installed")
FILE_LOADERS = ["torchvision", pytest.param("dali", marks=needs_dali)]


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Generated, so not of CIFAR's checksums."""
    monkeypatch.setattr(import_module("torchvision.datasets.cifar"), "check_integrity", lambda path, md5=None: True)
    return write_cifar100(tmp_path)


def test_cifar100_in_torchvisions_layout(cifar):
    streams = loaders(f"cifar100:{cifar}", batch_size=20, validation=0.2, augment="crop_flip")
    assert (streams.classes, streams.shape) == (10, (3, 32, 32)) and streams.train.loader == "resident"
    assert (len(streams.train.labels), len(streams.validation.labels), len(streams.test.labels)) == (50, 10, 20)
    reader = import_module("torchvision.datasets").CIFAR100(cifar)
    image, label = reader[17]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(streams.train.data.images[17], pixels) and streams.train.data.labels[17] == label
    flat = streams.train.data.images.transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(streams.train.work.mean.flatten(), flat.mean(1).float())
    torch.testing.assert_close(streams.train.work.deviation.flatten(), flat.std(1).float())


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_missing_cifar_is_one_sentence(tmp_path, kind):
    with pytest.raises(ValueError, match=f"must hold {kind.upper()} as torchvision stores it .*download"):
        loaders(f"{kind}:{tmp_path}", batch_size=8)


def test_damaged_cifar_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="must hold CIFAR100 as torchvision stores it"):  # not CIFAR's checksums
        loaders(f"cifar100:{write_cifar100(tmp_path)}", batch_size=8)


def test_failed_download_is_one_sentence(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(import_module("torchvision.datasets.cifar"), "download_and_extract_archive", offline)
    with pytest.raises(ValueError, match=r"CIFAR10 could not be downloaded to .* \(no route to host\)"):
        loaders(f"cifar10:{tmp_path}", batch_size=8, download=True)
    with pytest.raises(ValueError, match="folder cannot be downloaded"):
        loaders(f"folder:{tmp_path}", batch_size=8, download=True)


def write_tiny_imagenet(root, side=64):
    lines = []
    for number, picture in enumerate(pictures(12, side).images):
        name = f"n{number % 3:08d}"
        write_image(root / "train" / name / "images" / f"{name}_{number}.JPEG", picture)
        write_image(root / "val" / "images" / f"val_{number}.JPEG", picture)
        lines.append(f"val_{number}.JPEG\t{name}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


def test_tiny_imagenet(tmp_path):
    root = write_tiny_imagenet(tmp_path)
    streams = loaders(f"tiny-imagenet:{root}", batch_size=4)
    assert (streams.classes, streams.shape, streams.train.loader) == (3, (3, 64, 64), "resident")
    ((_, labels),) = streams.test
    assert labels.tolist() == [number % 3 for number in range(12)]
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99\t0\n")
    with pytest.raises(ValueError, match=r"names 'n99' as the class of val_0\.JPEG, which is none of the training's"):
        loaders(f"tiny-imagenet:{root}", batch_size=4)
    (root / "val" / "val_annotations.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"val_annotations\.txt names '' as the class of"):
        loaders(f"tiny-imagenet:{root}", batch_size=4)
    (root / "val" / "val_annotations.txt").unlink()
    with pytest.raises(ValueError, match="must be the unpacked tiny-imagenet-200, but it has no val/val_annotations"):
        loaders(f"tiny-imagenet:{root}", batch_size=4)


def test_which_loader_a_folder_gets(tmp_path):
    small = loaders(f"folder:{write_folder(tmp_path / 'a', sides=(40,))}", batch_size=8)
    assert small.train.loader == "resident" and small.shape == (3, 40, 40)
    several = loaders(f"folder:{write_folder(tmp_path / 'b', sides=(40, 50))}", batch_size=8)
    assert several.train.loader == ("dali" if available() else "torchvision") and several.shape == (3, 224, 224)
    large = loaders(f"folder:{write_folder(tmp_path / 'c', sides=(128,))}", batch_size=8, size=96)
    assert large.train.loader != "resident" and large.shape == (3, 96, 96)
    kept = loaders(f"folder:{tmp_path / 'c'}", batch_size=8, loader="resident")
    assert kept.shape == (3, 128, 128)
    with pytest.raises(ValueError, match=r"Images kept in memory must be of one size, got .* sizes"):
        loaders(f"folder:{tmp_path / 'b'}", batch_size=8, loader="resident")


def test_val_stands_for_test(tmp_path):
    root = write_folder(tmp_path, sides=(16,))
    (root / "test").rename(root / "val")
    assert len(loaders(f"folder:{root}", batch_size=8).test.labels) == 6


def test_what_notebooks_and_file_browsers_leave_behind_is_no_data(tmp_path):
    root = write_folder(tmp_path, sides=(16,))
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "class0" / "._000.jpg").write_bytes(b"of macOS")
    hidden = root / "train" / "class1" / ".ipynb_checkpoints" / "001-checkpoint.jpg"
    write_image(hidden, pictures(1, 16).images[0])
    assert len(loaders(f"folder:{root}", batch_size=8).train.labels) == 24


def test_a_home_is_found(tmp_path, monkeypatch):
    """No shell replaces the ~ of folder:~/data."""
    write_folder(tmp_path / "data", sides=(16,))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert loaders("folder:~/data", batch_size=8).classes == 3


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*is skipped:UserWarning")
def test_a_part_without_a_readable_image_is_one_sentence(tmp_path, workers):
    root = write_folder(tmp_path, sides=(64, 80))
    for path in (root / "test").rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:500])
    options = {"batch_size": 8, "loader": "torchvision", "on_broken": "skip", "workers": workers, "size": 32}
    with pytest.raises(ValueError, match=r"^None of the images of this part can be read\.$"):
        list(loaders(f"folder:{root}", **options).test)


def test_wrong_folders_are_one_sentence(tmp_path):
    root = write_folder(tmp_path / "data", sides=(16,))
    with pytest.raises(ValueError, match="nowhere/train must be a folder with a folder of images for each class"):
        loaders(f"folder:{tmp_path / 'nowhere'}", batch_size=8)
    shutil.rmtree(root / "test" / "class2")
    with pytest.raises(
        ValueError, match="must have the 3 classes of the training images, got 2 classes, 1 of them in one"
    ):
        loaders(f"folder:{root}", batch_size=8)
    (root / "test" / "class2").mkdir()
    (root / "test" / "class2" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"class2 must hold images of its class \(.*\.jpg.*\), got none"):
        loaders(f"folder:{root}", batch_size=8)


def test_too_few_images_of_a_class_are_one_sentence(tmp_path):
    root = write_folder(tmp_path, count=7, sides=(16,))
    for path in sorted((root / "train" / "class1").iterdir())[1:]:
        path.unlink()
    loaders(f"folder:{root}", batch_size=2)  # without a split one is enough
    with pytest.raises(ValueError, match="each class needs at least two, got 1 of class1"):
        loaders(f"folder:{root}", batch_size=2, validation=0.2)


def broken_folder(root, sides):
    """Two broken images: one whose head cannot be read, one that is cut short."""
    root = write_folder(root, sides=sides)
    first, second = sorted((root / "train" / "class1").iterdir())[:2]
    first.write_bytes(b"no image at all")
    second.write_bytes(second.read_bytes()[: second.stat().st_size // 2])
    return root, {str(first), str(second)}


@pytest.mark.filterwarnings("ignore:.*is skipped:UserWarning")
def test_broken_images_in_memory_are_left_out(tmp_path):
    root, broken = broken_folder(tmp_path, (64,))
    with pytest.raises(
        ValueError, match=r"cannot be read as an image .*; remove it, or pass over such with on_broken 'skip'"
    ):
        loaders(f"folder:{root}", batch_size=8)
    streams = loaders(f"folder:{root}", batch_size=8, on_broken="skip")
    assert set(streams.broken) == broken and len(streams.train.labels) == 22
    with pytest.raises(ValueError, match=r"More than 1 images cannot be read .*; repair them, or raise broken_limit"):
        loaders(f"folder:{root}", batch_size=8, on_broken="skip", broken_limit=1)


def checked(part, own, broken):
    """The batches of an epoch, each found to be of readable images of this part, with their labels."""
    for images, labels in part:
        assert torch.equal(labels, part.data.labels[part.samples])
        assert torch.equal(part.members[part.indices], part.samples)
        assert set(part.samples.tolist()) <= own  # never one that is held out
        assert not {part.data.paths[sample] for sample in part.samples.tolist()} & broken
        yield images, labels


@pytest.mark.parametrize("loader", FILE_LOADERS)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*is skipped:UserWarning")
def test_broken_images_in_files_are_named_and_replaced(tmp_path, loader, workers):
    root, broken = broken_folder(tmp_path, (64, 80))
    options = {"batch_size": 8, "loader": loader, "size": 32, "augment": "crop_flip", "workers": workers}
    with pytest.raises(ValueError, match=r"cannot be read as an image .*; remove it, or pass over such"):
        list(loaders(f"folder:{root}", **options).train)
    with pytest.raises(ValueError, match="More than 1 images cannot be read"):
        list(loaders(f"folder:{root}", **options, on_broken="skip", broken_limit=1).train)
    streams = loaders(f"folder:{root}", **options, on_broken="skip", validation=0.25)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for part in (streams.train, streams.validation):
            own = set(part.members.tolist())
            for images, labels in [batch for _ in range(2) for batch in checked(part, own, broken)]:
                assert images.isfinite().all() and len(labels) == len(images)
    named = [str(warning.message) for warning in caught if "is skipped" in str(warning.message)]
    assert sorted(text.split(" cannot be read")[0] for text in named) == sorted(broken)
    assert set(streams.broken) == broken


@pytest.mark.parametrize("loader", FILE_LOADERS)
@pytest.mark.filterwarnings("ignore:.*is skipped:UserWarning")
def test_an_image_that_stands_for_a_broken_one_is_augmented_as_itself(tmp_path, loader):
    """What a teacher said about (image, variant) holds for it, wherever it comes in the epoch."""
    root, _ = broken_folder(tmp_path, (64, 80))
    options = {"batch_size": 8, "loader": loader, "size": 32, "augment": "crop_flip", "workers": 0}
    stream = loaders(f"folder:{root}", **options, on_broken="skip").train
    given, twice = {}, 0
    for images, _ in stream:
        for sample, image in zip(stream.samples.tolist(), images, strict=True):
            twice += sample in given
            assert torch.equal(given.setdefault(sample, image), image)
    assert twice == 2


@needs_dali
@pytest.mark.filterwarnings("ignore:.*is skipped:UserWarning")
def test_replaced_images_are_the_same_for_all(tmp_path):
    root, _ = broken_folder(tmp_path, (64, 80))
    samples = []
    for loader in ("torchvision", "dali"):
        streams = loaders(f"folder:{root}", batch_size=8, loader=loader, size=32, on_broken="skip", workers=0)
        samples.append([streams.train.samples for _ in streams.train])
    assert all(map(torch.equal, *samples))
