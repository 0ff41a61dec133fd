"""Small data sets for the tests, made in a moment."""

import pickle

import numpy as np
import torch
from PIL import Image

from kdfast.data import ImageSet


def pictures(count=40, side=32, classes=4, seed=0):
    """Smooth random colours, as photographs are: uint8 [count, 3, side, side]."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 5, 5, generator=generator)
    large = torch.nn.functional.interpolate(small, size=(side, side), mode="bicubic").clamp(0, 1)
    return ImageSet((large * 255).to(torch.uint8), torch.arange(count) % classes)


def write_image(path, picture):  # [3, height, width]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path, **({"quality": 92} if path.suffix == ".jpg" else {}))


def write_folder(root, count=24, sides=(120, 150, 200), classes=3, suffix=".jpg", tests=6):
    """ROOT/train and ROOT/test, the images' heights and widths drawn from `sides`."""
    generator = torch.Generator().manual_seed(1)
    for part, images in (("train", count), ("test", tests)):
        for number in range(images):
            height, width = (sides[int(x)] for x in torch.randint(len(sides), (2,), generator=generator))
            picture = pictures(1, max(sides), seed=number + 1000 * (part == "test")).images[0, :, :height, :width]
            write_image(root / part / f"class{number % classes}" / f"{number:03d}{suffix}", picture)
    return root


def write_cifar100(root, train=60, test=20):
    """Torchvision's layout: pickled batches of flat images, and the classes' names."""
    base = root / "cifar-100-python"
    base.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, count in (("train", train), ("test", test)):
        data = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        batch = {"data": data, "fine_labels": [number % 10 for number in range(count)]}
        (base / name).write_bytes(pickle.dumps(batch))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {number}" for number in range(10)]}))
    return root
