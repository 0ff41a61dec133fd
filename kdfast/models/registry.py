"""Networks by name: `create("resnet20", classes=100)`."""

import re
from typing import Any

from torch import nn

from kdfast._torchvision import import_module
from kdfast.models.resnet import CifarResNet


def names() -> list[str]:
    """The networks of kdfast; with "torchvision:" or "timm:" before it, also every classifier of these libraries."""
    return [f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)]


def create(name: str, classes: int = 10, in_channels: int = 3, **options: Any) -> nn.Module:
    """A network with fresh weights, or with those its `options` ask for.

    Args:
        name: of `names()`; or "torchvision:NAME", "timm:NAME".
        classes: number of logits.
        in_channels: channels of the images.
        options: of the network itself, as ``widths=(4, 8, 8)`` of a resnet, ``pretrained=True`` of timm.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> create("resnet8", classes=10, in_channels=1, widths=(8, 16, 16))
    """
    library, _, rest = name.partition(":")
    if rest and library == "timm":
        return import_module("timm").create_model(rest, num_classes=classes, in_chans=in_channels, **options)
    if rest and library == "torchvision":
        if in_channels != 3:
            raise ValueError(f"{name} takes images of 3 channels, the data has {in_channels}; choose another network.")
        return import_module("torchvision.models").get_model(rest, num_classes=classes, **options)
    if match := re.fullmatch(r"resnet(\d+)", name):
        return CifarResNet(int(match[1]), in_channels=in_channels, classes=classes, **options)
    raise ValueError(f"A network must be one of {', '.join(names())}, torchvision:NAME or timm:NAME, got {name!r}.")
