"""Networks by name: `create("resnet20", classes=100)`."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from kdfast._torchvision import import_module
from kdfast.models.four_stage_resnet import FourStageResNet
from kdfast.models.mobilenet import MobileNetV2
from kdfast.models.resnet import CifarResNet
from kdfast.models.resnext import ResNeXt29
from kdfast.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from kdfast.models.vgg import VGG
from kdfast.models.wide_resnet import WideResNet

ZOO: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(CifarResNet, depth, widths=(64, 128, 256), stem=32) for depth in (8, 32)},
    **{f"resnet{depth}": partial(FourStageResNet, depth) for depth in (18, 34, 50, 101, 152)},
    **{
        f"wrn_{depth}_{factor}": partial(WideResNet, depth, factor)
        for depth, factor in ((16, 1), (16, 2), (16, 4), (28, 2), (28, 4), (28, 10), (40, 1), (40, 2))
    },
    **{f"vgg{depth}_bn": partial(VGG, depth) for depth in (8, 11, 13, 16, 19)},
    "mobilenetv2": MobileNetV2,
    "shufflenetv1": ShuffleNetV1,
    "shufflenetv2": ShuffleNetV2,
    "resnext29": ResNeXt29,
    "resnext29_2x64d": partial(ResNeXt29, 2),
}


def names() -> list[str]:
    """The networks of kdfast; with "torchvision:" or "timm:" before it, also every classifier of these libraries."""
    return list(ZOO)


def create(name: str, classes: int = 10, in_channels: int = 3, **options: Any) -> nn.Module:
    """A network with fresh weights, or with those its `options` ask for.

    Args:
        name: of `names()`, or resnetN and wrn_N_K of any other depth and width; or "torchvision:NAME", "timm:NAME".
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
    if name in ZOO:
        make = ZOO[name]
    elif match := re.fullmatch(r"resnet(\d+)", name):
        make = partial(CifarResNet, int(match[1]))
    elif match := re.fullmatch(r"wrn_(\d+)_(\d+)", name):
        make = partial(WideResNet, int(match[1]), int(match[2]))
    else:
        raise ValueError(f"A network must be one of {', '.join(names())}, torchvision:NAME or timm:NAME, got {name!r}.")
    return make(in_channels=in_channels, classes=classes, **options)
