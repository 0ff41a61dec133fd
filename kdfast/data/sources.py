"""Data sets by name: where their images are, their classes and their statistics."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdfast._torchvision import import_module
from kdfast.data.digits import digit_parts, raw_digits
from kdfast.data.files import Broken, Files, decoded, size_of
from kdfast.data.tensors import ImageSet

SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}  # torchvision's ImageFolder's
KEPT_SIDE = 96  # images of one size up to this keep it
MEMORY = 2 << 30  # bytes a data set may take in memory, where not asked for
# ImageNet's, which pretrained networks expect; sets that are never in memory have no others
MEAN, DEVIATION = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])

Images = ImageSet | Files


@dataclass
class Source:
    """A data set.

    Attributes:
        train, test: its images.
        classes: their names.
        mean, deviation: [channels], of pixels from 0 to 255; of the training images, or ImageNet's where those stay
            in files.
        broken: what is done about images that cannot be read, and which were found.
    """

    train: Images
    test: Images
    classes: list[str]
    mean: Tensor
    deviation: Tensor
    broken: Broken


def read_source(spec: str, broken: Broken, *, download: bool, size: int | None, in_memory: bool | None) -> Source:
    """The data set of a `kdfast.data.loaders` spec.

    Args:
        in_memory: whether images are decoded once and kept; None: where they are of one size and small enough.

    Raises:
        ValueError: for what is not there or cannot be used; one sentence.
    """
    kind, _, root = str(spec).partition(":")
    with contextlib.suppress(RuntimeError):  # of somebody who has no home
        root = root and str(Path(root).expanduser())  # no shell does it behind a colon
    if str(spec) == "digits":
        train, test, names = _digits()
    elif kind in ("cifar10", "cifar100") and root:
        train, test, names = _cifar(kind, root, download)
    elif kind in ("folder", "tiny-imagenet") and root:
        if download:
            raise ValueError(f"{kind} cannot be downloaded; fetch it yourself and name its folder.")
        listed = _folder(Path(root)) if kind == "folder" else _tiny_imagenet(Path(root))
        return _from_files(*listed, broken, size, in_memory)
    else:
        raise ValueError(
            "The data must be 'digits', 'cifar10:ROOT', 'cifar100:ROOT', 'folder:ROOT' or 'tiny-imagenet:ROOT', "
            f"got {spec!r}."
        )
    _check_size(size, train)
    return Source(train, test, names, *_statistics(train), broken)


def _check_size(size: int | None, images: ImageSet) -> None:
    height, width = images.images.shape[2:]
    if size is not None and (height, width) != (size, size):
        raise ValueError(
            f"These images are kept at their own {height} x {width} pixels, got size {size}; leave it out."
        )


def _statistics(images: ImageSet) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, exact, in pieces: as floats a data set is four times as large."""
    count, channels = images.images.shape[:2]
    total, squares = torch.zeros(2, channels, dtype=torch.float64)
    for piece in images.images.split(4096):
        flat = piece.transpose(0, 1).flatten(1).double()  # [channels, pixels]
        total, squares = total + flat.sum(1), squares + flat.square().sum(1)
    pixels = count * images.images[0, 0].numel()
    mean = total / pixels
    deviation = ((squares / pixels - mean.square()).clamp(min=0) * pixels / max(pixels - 1, 1)).sqrt()
    return mean.float(), deviation.clamp(min=1e-6).float()


def _digits() -> tuple[ImageSet, ImageSet, list[str]]:
    images, labels = raw_digits()
    train, _, test = digit_parts(labels, 100, 0)
    data = ImageSet((15 * images).to(torch.uint8), labels)  # 0..16 to 0..240
    return data.take(train), data.take(test), [str(digit) for digit in range(10)]


def _cifar(kind: str, root: str, download: bool) -> tuple[ImageSet, ImageSet, list[str]]:
    reader = getattr(import_module("torchvision.datasets"), kind.upper())
    try:
        train, test = (reader(root, train=part, download=download) for part in (True, False))
    except RuntimeError as error:  # not there, or other files than CIFAR's
        raise ValueError(
            f"{root} must hold {kind.upper()} as torchvision stores it ({reader.base_folder}/), whole and unchanged; "
            "name another folder, or let it be downloaded (download=True, --download)."
        ) from error
    except OSError as error:
        raise ValueError(
            f"{kind.upper()} could not be downloaded to {root} ({error}); name a folder with it."
        ) from error
    sets = [
        ImageSet(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (train, test)
    ]
    return *sets, list(train.classes)


Listing = list[tuple[str, int]]  # path and class of every image


def _folder(root: Path) -> tuple[Listing, Listing, list[str]]:
    """ROOT/train/CLASS/*, and ROOT/test/CLASS/* or ROOT/val/CLASS/*."""
    names = _classes(root / "train")
    test = root / ("val" if (root / "val").is_dir() and not (root / "test").is_dir() else "test")
    if (found := _classes(test)) != names:
        raise ValueError(
            f"{test} must have the {len(names)} classes of the training images, got {len(found)} classes, "
            f"{len(set(found) ^ set(names))} of them in one of the two only."
        )
    train, held = (_listed(part, names, lambda folder: folder) for part in (root / "train", test))
    return train, held, names


def _tiny_imagenet(root: Path) -> tuple[Listing, Listing, list[str]]:
    """ROOT/train/CLASS/images/*; ROOT/val/images/* with their classes in ROOT/val/val_annotations.txt."""
    names = _classes(root / "train")
    train = _listed(root / "train", names, lambda folder: folder / "images")
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise ValueError(f"{root} must be the unpacked tiny-imagenet-200, but it has no val/{annotations.name}.")
    numbers = {name: number for number, name in enumerate(names)}
    test = []
    for line in annotations.read_text(encoding="utf-8", errors="replace").splitlines():
        file, name = line.split("\t")[:2] if "\t" in line else (line, "")
        if name not in numbers:
            raise ValueError(f"{annotations} names {name!r} as the class of {file}, which is none of the training's.")
        test.append((str(root / "val" / "images" / file), numbers[name]))
    if not test:
        raise ValueError(f"{annotations} must name the images of the test set, got none.")
    return train, test, names


def _classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f"{folder} must be a folder with a folder of images for each class; there is none.")
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(found) < 2:
        raise ValueError(f"{folder} must hold a folder for each of at least two classes, got {len(found)}.")
    return found


def _hidden(path: Path) -> bool:
    """As what notebooks (.ipynb_checkpoints/) and macOS (._cat.jpg) leave beside images."""
    return any(part.startswith(".") for part in path.parts)


def _listed(folder: Path, names: list[str], inside: Callable[[Path], Path]) -> Listing:
    listing: Listing = []
    for label, name in enumerate(names):
        of_class = inside(folder / name)
        paths = (path for path in of_class.rglob("*") if path.suffix.lower() in SUFFIXES)
        found = sorted(str(path) for path in paths if not _hidden(path.relative_to(of_class)))
        if not found:
            raise ValueError(f"{of_class} must hold images of its class ({', '.join(sorted(SUFFIXES))}), got none.")
        listing += [(path, label) for path in found]
    return listing


def _from_files(
    train: Listing, test: Listing, names: list[str], broken: Broken, size: int | None, in_memory: bool | None
) -> Source:
    """In memory where the images are small and of one size, else left in their files."""
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}.")
    height, width = _first_size(train)
    estimate = 3 * height * width * (len(train) + len(test))
    small = max(height, width) <= KEPT_SIDE and size in (None, height) and estimate <= MEMORY
    kept = in_memory or (small and in_memory is None)
    if small or kept:  # of one size? Only then is it worth opening every file.
        parts, sizes = [], set()
        for listing in (train, test):
            sound, found = _sizes(listing, broken)
            parts.append(sound)
            sizes |= found
        (train, test), one = parts, len(sizes) == 1
        for listing in parts:
            _check_every_class(listing, names)
        if in_memory and not one:
            raise ValueError(
                f"Images kept in memory must be of one size, got {len(sizes)} sizes; resize them first, or take "
                "another loader."
            )
        if kept and one:
            sets = [_decoded(listing, names, broken) for listing in (train, test)]
            _check_size(size, sets[0])
            return Source(*sets, names, *_statistics(sets[0]), broken)
        small = small and one
    side = size or 224
    shape = (3, height, width) if small else (3, side, side)
    files = [
        Files([path for path, _ in part], torch.tensor([label for _, label in part]), broken, shape, not small)
        for part in (train, test)
    ]
    return Source(*files, names, MEAN, DEVIATION, broken)


def _first_size(listing: Listing) -> tuple[int, int]:
    """Height and width of the first image that opens; where none does, that is found again, and told, later."""
    for path, _ in listing[:100]:
        with contextlib.suppress(OSError):
            return size_of(Path(path))
    return 224, 224


def _sizes(listing: Listing, broken: Broken) -> tuple[Listing, set[tuple[int, int]]]:
    sound, sizes = [], set()
    for path, label in listing:
        try:
            sizes.add(size_of(Path(path)))
        except OSError as error:
            broken.found(path, _reason(error))
            continue
        sound.append((path, label))
    return sound, sizes


def _decoded(listing: Listing, names: list[str], broken: Broken) -> ImageSet:
    images, sound = [], []
    for path, label in listing:
        try:
            images.append(np.asarray(decoded(Path(path))))
            sound.append((path, label))
        except OSError as error:
            broken.found(path, _reason(error))
    _check_every_class(sound, names)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()  # [count, 3, height, width]
    return ImageSet(stacked, torch.tensor([label for _, label in sound]))


def _reason(error: OSError) -> str:
    return str(error.strerror or error).split(" '")[0]


def _check_every_class(listing: Listing, names: list[str]) -> None:
    if missing := set(range(len(names))) - {label for _, label in listing}:
        raise ValueError(f"Class {names[min(missing)]} must have images, got none that can be read.")
