"""ShuffleNet V1 and V2 for small images: a 1x1 stem, three stages."""

import torch
from torch import Tensor, nn

from kdfast.models.staged import GlobalAveragePool, StagedNetwork, conv_bn_relu

STEM = 24


def shuffled(
    x: Tensor,  # [batch, channels, height, width]
    groups: int,
) -> Tensor:  # [batch, channels, height, width]
    """The channels of all groups in turn: the first of each, the second of each, ..."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def _depthwise(channels: int, stride: int) -> tuple[nn.Module, nn.Module]:
    return (
        nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
    )


class _UnitV1(nn.Module):
    """Grouped 1x1, shuffle, 3x3 a channel, grouped 1x1; added to the input, or beside its pooled self where halved."""

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int):
        super().__init__()
        made = channels - in_channels if stride == 2 else channels  # by the branch; the shortcut brings the others
        inner = made // 4
        self.groups = 1 if in_channels == STEM else groups  # too few channels to group
        self.reduce = nn.Sequential(
            nn.Conv2d(in_channels, inner, 1, groups=self.groups, bias=False), nn.BatchNorm2d(inner), nn.ReLU()
        )
        self.expand = nn.Sequential(
            *_depthwise(inner, stride),
            nn.ReLU(),
            nn.Conv2d(inner, made, 1, groups=groups, bias=False),
            nn.BatchNorm2d(made),
        )
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:  # [batch, in_channels, height, width]
        out = self.expand(shuffled(self.reduce(x), self.groups))
        return torch.relu(out + x if self.pool is None else torch.cat([out, self.pool(x)], 1))  # [batch, channels, ...]


class ShuffleNetV1(StagedNetwork):
    """ShuffleNet with 3 groups: 16x16, 8x8 and 4x4 maps of 32x32 images.

    Args:
        in_channels: channels of the images.
        classes: number of logits.

    Source: Zhang, Zhou, Lin, Sun, "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices",
    CVPR 2018, table 1, g = 3 (arXiv:1707.01083); the 1x1 stem without pooling as in Tian et al., "Contrastive
    Representation Distillation", ICLR 2020 (arXiv:1910.10699).

    Example:
        >>> ShuffleNetV1(classes=100).widths
        (240, 480, 960)
    """

    def __init__(self, in_channels: int = 3, classes: int = 10):
        widths, channels, stages = (240, 480, 960), STEM, []
        for width, count in zip(widths, (4, 8, 4), strict=True):
            units = [_UnitV1(channels, width, 2, groups=3)]
            stages.append(nn.Sequential(*units, *(_UnitV1(width, width, 1, groups=3) for _ in range(count - 1))))
            channels = width
        head = nn.Sequential(GlobalAveragePool(), nn.Linear(channels, classes))
        super().__init__(conv_bn_relu(in_channels, STEM, kernel=1), stages, head, widths)


class _UnitV2(nn.Module):
    """Half of the channels as they are, the other half through 1x1, 3x3 a channel, 1x1; shuffled."""

    def __init__(self, channels: int):
        super().__init__()
        self.half = channels // 2
        self.branch = _branch_v2(self.half, self.half, 1)

    def forward(self, x: Tensor) -> Tensor:  # [batch, channels, height, width], as is what it returns
        return shuffled(torch.cat([x[:, : self.half], self.branch(x[:, self.half :])], 1), 2)


class _HalvingUnitV2(nn.Module):
    """All channels through two branches that halve the resolution; shuffled."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.left = nn.Sequential(*_depthwise(in_channels, 2), *conv_bn_relu(in_channels, channels // 2, kernel=1))
        self.right = _branch_v2(in_channels, channels // 2, 2)

    def forward(self, x: Tensor) -> Tensor:  # [batch, in_channels, height, width]
        return shuffled(torch.cat([self.left(x), self.right(x)], 1), 2)  # [batch, channels, height/2, width/2]


def _branch_v2(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        *conv_bn_relu(in_channels, channels, kernel=1),
        *_depthwise(channels, stride),
        *conv_bn_relu(channels, channels, kernel=1),
    )


class ShuffleNetV2(StagedNetwork):
    """ShuffleNet V2 of width 1: 16x16, 8x8 and 4x4 maps of 32x32 images, a 1x1 convolution in the head.

    Args:
        in_channels: channels of the images.
        classes: number of logits.

    Source: Ma, Zhang, Zheng, Sun, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018,
    table 5 (arXiv:1807.11164); the 1x1 stem without pooling as in Tian et al., "Contrastive Representation
    Distillation", ICLR 2020 (arXiv:1910.10699).

    Example:
        >>> ShuffleNetV2(classes=100).widths
        (116, 232, 464)
    """

    def __init__(self, in_channels: int = 3, classes: int = 10):
        widths, channels, stages = (116, 232, 464), STEM, []
        for width, count in zip(widths, (4, 8, 4), strict=True):
            stages.append(nn.Sequential(_HalvingUnitV2(channels, width), *(_UnitV2(width) for _ in range(count - 1))))
            channels = width
        last = 1024
        head = nn.Sequential(*conv_bn_relu(channels, last, kernel=1), GlobalAveragePool(), nn.Linear(last, classes))
        super().__init__(conv_bn_relu(in_channels, STEM, kernel=1), stages, head, widths)
