"""Networks for the common benchmarks; they hand out their stage features as values, without hooks."""

from kdfast.models.four_stage_resnet import FourStageResNet
from kdfast.models.mobilenet import MobileNetV2
from kdfast.models.registry import create, names
from kdfast.models.resnet import CifarResNet
from kdfast.models.resnext import ResNeXt29
from kdfast.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from kdfast.models.staged import StagedNetwork
from kdfast.models.tapped import Tapped
from kdfast.models.vgg import VGG
from kdfast.models.wide_resnet import WideResNet

__all__ = [
    "VGG",
    "CifarResNet",
    "FourStageResNet",
    "MobileNetV2",
    "ResNeXt29",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "StagedNetwork",
    "Tapped",
    "WideResNet",
    "create",
    "names",
]
