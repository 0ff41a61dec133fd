"""Residual blocks. Their layers are named conv1, bn1, conv2, ...: the last of them ends the residual branch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; a 1x1 convolution matches the shortcut where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:  # [batch, in_channels, height, width]
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))  # [batch, channels, height/s, width/s]


class Bottleneck(nn.Module):
    """A 1x1 convolution to fewer channels, a 3x3 of them in `groups`, a 1x1 to `channels`, around a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, inner: int, groups: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:  # [batch, in_channels, height, width]
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        return torch.relu(self.bn3(self.conv3(out)) + self.shortcut(x))  # [batch, channels, height/s, width/s]


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


def stage(block: Callable[[int, int, int], nn.Module], count: int, in_channels: int, channels: int, stride: int):
    """`count` blocks (in_channels, channels, stride) in a row, of which the first changes the shape."""
    first = block(in_channels, channels, stride)
    return nn.Sequential(first, *(block(channels, channels, 1) for _ in range(count - 1)))
