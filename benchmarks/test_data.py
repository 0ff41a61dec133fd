"""Images a second of each loader, on CIFAR-100 and on JPEGs of 224 pixels, with all the cores there are.

    pytest benchmarks --benchmark-only -k data

A round is an epoch (of CIFAR, over a random quarter of the images): padded crop or random resized crop, flip,
normalisation, batches of 128 on the device; one thread of torch, workers on every core. `torchvision`, `resident` and
`dali` are kdfast's loaders; `plain` is the DataLoader as most write it, a transform an image, without kdfast.
KDFAST_CIFAR100 may name a folder with CIFAR-100 (torchvision's layout, or train/CLASS/*.png and test/CLASS/*.png); else
the images are random ones of its number and size, and the case says so.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

from benchmarks.interleave import DEVICES, enter, measure
from kdfast._torchvision import import_module
from kdfast.data import ImageSet, Stream, loaders
from kdfast.data.dali import available

ROOT = os.environ.get("KDFAST_CIFAR100")
BATCH, JPEGS, OF_CIFAR = 128, 512, 12_800
CORES = len(os.sched_getaffinity(0))
needs_dali = pytest.mark.skipif(not available(), reason="NVIDIA DALI is not installed")
IMPLEMENTATIONS = ["torchvision", "plain", "resident", pytest.param("dali", marks=needs_dali)]
CASES = ["cifar100", "jpeg224"]


def cifar() -> tuple[ImageSet, str]:
    if ROOT is None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return ImageSet(images, torch.arange(50_000) % 100), "cifar100 (random pixels)"
    spec = f"folder:{ROOT}" if (Path(ROOT) / "train").is_dir() else f"cifar100:{ROOT}"
    return loaders(spec, batch_size=BATCH, loader="resident").source.train, "cifar100"


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """Images with detail of every size, so that they decode as photographs do: about 25 kB each."""
    root, generator = tmp_path_factory.mktemp("jpegs"), np.random.default_rng(0)
    for number in range(JPEGS + 64):
        image = np.zeros((224, 224, 3), np.float32)
        for side, strength in ((4, 90), (16, 60), (64, 40), (224, 25)):
            noise = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            image += strength / 215 * np.asarray(Image.fromarray(noise).resize((224, 224), Image.BICUBIC), np.float32)
        folder = root / ("train" if number < JPEGS else "test") / str(number % 8)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
    return root


class Plain(Dataset):
    """What a tutorial would write."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        image = Image.open(image).convert("RGB") if isinstance(image, str) else Image.fromarray(image)
        return self.transform(image), self.labels[index]


def plain(images, labels, device, crop, members=None):
    v2 = import_module("torchvision.transforms.v2")
    scale = v2.ToDtype(torch.float32, scale=True)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.ToImage(), scale, v2.Normalize([0.5] * 3, [0.25] * 3)])
    data = Plain(images, labels, transform)
    data = data if members is None else Subset(data, members)
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True, num_workers=CORES, persistent_workers=True)
    return ((x.to(device), y.to(device)) for _ in iter(int, 1) for x, y in loader), len(loader)


def endless(stream):
    while True:
        yield from stream


def of_case(case, root, device):
    """Each implementation's endless batches, how many an epoch has, and the case's name."""
    v2 = import_module("torchvision.transforms.v2")
    names = ["torchvision", "dali"] if available() else ["torchvision"]
    if case == "cifar100":
        data, title = cifar()
        members = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))[:OF_CIFAR]
        statistics = torch.full((3,), 127.5), torch.full((3,), 63.75)
        on_device = ImageSet(data.images.to(device), data.labels)
        streams = {
            name: Stream(
                on_device if name == "resident" else data, *statistics, BATCH, seed=0, augment="crop_flip", loader=name,
                members=members, device=device,
            )
            for name in [*names, "resident"]
        }  # fmt: skip
        arrays = data.images.permute(0, 2, 3, 1).contiguous().numpy()
        others = plain(arrays, data.labels.tolist(), device, v2.RandomCrop(32, padding=4), members.tolist())
    else:
        title = f"{JPEGS} JPEGs of 224 px"
        options = {"batch_size": BATCH, "augment": "crop_flip", "size": 224, "device": device}
        streams = {name: loaders(f"folder:{root}", loader=name, **options).train for name in names}
        files = streams["torchvision"].data
        others = plain(files.paths, files.labels.tolist(), device, v2.RandomResizedCrop(224))
    return {**{name: (endless(s), len(s)) for name, s in streams.items()}, "plain": others}, title


_cases: dict[tuple, tuple] = {}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_data(benchmark, jpegs, device, case, implementation):
    if (case, implementation) == ("jpeg224", "resident"):
        pytest.skip("images that are decoded for each batch are not resident")
    if (device, case) not in _cases:
        _cases.clear()  # with their workers
        _cases[device, case] = of_case(case, jpegs, device)
    batches, title = _cases[device, case]

    def epoch(items, count):
        def run():
            for _ in range(count):
                next(items)

        return run

    runs = {name: epoch(items, count) for name, (items, count) in batches.items()}
    rounds = measure(("data", device, case), runs, seconds=10.0, sync=device == "cuda")
    enter(
        benchmark, rounds[implementation], op="data", case=title, impl=implementation, dtype="float32", device=device,
        threads=torch.get_num_threads(), workers=CORES, images=batches[implementation][1] * BATCH,
    )  # fmt: skip
