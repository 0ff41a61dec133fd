"""Wide residual networks: three stages of pre-activation blocks."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from kdfast.models.blocks import stage
from kdfast.models.staged import GlobalAveragePool, StagedNetwork


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions; where the shape changes the shortcut leaves after them."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = stride == 1 and in_channels == channels
        self.shortcut = None if same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [batch, in_channels, height, width]
        active = torch.relu(self.bn1(x))
        out = self.conv2(torch.relu(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))  # [batch, channels, height/s, width/s]


class WideResNet(StagedNetwork):
    """WRN-depth-factor: a 3x3 stem of 16 channels, three stages of pre-activation blocks, BatchNorm and ReLU, pooling.

    A stage's feature map is the sum of its last block, before the next BatchNorm.

    Args:
        depth: 6n+4 (10, 16, 22, 28, 40, ...).
        factor: the widening factor k; the stages have 16k, 32k and 64k channels.
        in_channels: channels of the images.
        classes: number of logits.

    Raises:
        ValueError: for a depth that is not 6n+4, or a factor below 1.

    Source: Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016, table 1 (arXiv:1605.07146), without dropout.

    Example:
        >>> WideResNet(16, 2, classes=100).widths
        (32, 64, 128)
    """

    def __init__(self, depth: int, factor: int, in_channels: int = 3, classes: int = 10):
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n+4 with n >= 1 (10, 16, 22, ...), got {depth}.")
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}.")
        widths = [16 * factor, 32 * factor, 64 * factor]
        super().__init__(
            nn.Sequential(nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)),
            [
                stage(PreActivationBlock, (depth - 4) // 6, before, width, stride)
                for stride, (before, width) in zip((1, 2, 2), pairwise([16, *widths]), strict=True)
            ],
            nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU(), GlobalAveragePool(), nn.Linear(widths[-1], classes)),
            widths,
        )
        self.depth = depth
