"""The transforms a student feature may take to a teacher feature: convolutions, resizing, attention.

    conv1   1x1 conv, BatchNorm, resize
    conv2   1x1 conv, BatchNorm, attention, resize, 3x3 conv, BatchNorm
    conv3   conv2, 3x3 conv, BatchNorm

Resizing is nearest-neighbour, attention multiplies the feature by a 1x1 convolution of itself to one channel
(no sigmoid), no convolution has a bias, and weights start at N(0, 2 / (k^2 * output channels)).

Source: Deng et al., "DistPro", ECCV 2022 (arXiv:2204.05547), figure 4, and the layers of its published code.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F


class Transform(nn.Module):
    """From a student's feature map to the shape of a teacher's.

    Args:
        in_channels: of the student's feature.
        out_channels: of the teacher's.
        convolutions: 3x3 convolutions after resizing; with at least one there is also attention before it.
    """

    def __init__(self, in_channels: int, out_channels: int, convolutions: int):
        super().__init__()
        self.project = _conv_norm(in_channels, out_channels, 1)
        self.attention = _conv(out_channels, 1, 1) if convolutions else None
        self.refine = nn.Sequential(*(_conv_norm(out_channels, out_channels, 3) for _ in range(convolutions)))

    def forward(
        self,
        feature: Tensor,  # [batch, in_channels, height, width]
        size: Sequence[int],  # the teacher's (height, width)
    ) -> Tensor:  # [batch, out_channels, *size]
        x = self.project(feature)
        if self.attention is not None:
            x = x * self.attention(x)
        if x.shape[2:] != tuple(size):
            x = F.interpolate(x, size=tuple(size), mode="nearest")
        return self.refine(x)


def _conv(in_channels: int, out_channels: int, kernel: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    nn.init.normal_(conv.weight, std=(2 / (kernel**2 * out_channels)) ** 0.5)
    return conv


def _conv_norm(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(_conv(in_channels, out_channels, kernel), nn.BatchNorm2d(out_channels))


TRANSFORMS = {name: partial(Transform, convolutions=i) for i, name in enumerate(("conv1", "conv2", "conv3"))}
