"""Networks for the common benchmarks; they hand out their stage features as values, without hooks."""

from kdfast.models.registry import create, names
from kdfast.models.resnet import CifarResNet

__all__ = ["CifarResNet", "create", "names"]
