"""The transforms a student feature may take to a teacher feature: convolutions, resizing, attention.

    conv1   1x1 conv, BatchNorm, resize
    conv2   1x1 conv, BatchNorm, attention, resize, 3x3 conv, BatchNorm
    conv3   conv2, 3x3 conv, BatchNorm
    complex 3x3 conv, BatchNorm, ReLU, attention, 3x3 conv, BatchNorm, ReLU, resize, 3x3 conv, BatchNorm;
            the first two of min(512, both channels): the one the published code uses

Resizing is nearest-neighbour, attention multiplies the feature by a 1x1 convolution of itself to one channel
(no sigmoid unless asked), no convolution has a bias, and weights start at N(0, 2 / (k^2 * output channels)).

Source: Deng et al., "DistPro", ECCV 2022 (arXiv:2204.05547), figure 4, and the layers of its published code.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

ATTENTIONS = ("linear", "sigmoid", "none")
WIDEST = 512  # channels inside "complex" at most


class Transform(nn.Module):
    """From a student's feature map to the shape of a teacher's.

    Args:
        in_channels: of the student's feature.
        out_channels: of the teacher's.
        convolutions: 3x3 convolutions after resizing; with at least one there is also attention before it.
        attention: what multiplies the feature: "linear", the convolution of itself to one channel; "sigmoid" of that;
            or "none".
    """

    def __init__(self, in_channels: int, out_channels: int, convolutions: int, attention: str = "linear"):
        super().__init__()
        self.project = _conv_norm(in_channels, out_channels, 1)
        self.attention = Attention(out_channels, attention) if convolutions else nn.Identity()
        self.refine = nn.Sequential(*(_conv_norm(out_channels, out_channels, 3) for _ in range(convolutions)))

    def forward(
        self,
        feature: Tensor,  # [batch, in_channels, height, width]
        size: Sequence[int],  # the teacher's (height, width)
    ) -> Tensor:  # [batch, out_channels, *size]
        return self.refine(_resized(self.attention(self.project(feature)), size))


class Complex(nn.Module):
    """The one transform of the published code's search.

    Args:
        in_channels: of the student's feature.
        out_channels: of the teacher's.
        attention: see `Transform`.
    """

    def __init__(self, in_channels: int, out_channels: int, attention: str = "linear"):
        super().__init__()
        mid = min(WIDEST, in_channels, out_channels)
        self.reduce = nn.Sequential(_conv_norm(in_channels, mid, 3), nn.ReLU())
        self.attention = Attention(mid, attention)
        self.middle = nn.Sequential(_conv_norm(mid, mid, 3), nn.ReLU())
        self.refine = _conv_norm(mid, out_channels, 3)

    def forward(
        self,
        feature: Tensor,  # [batch, in_channels, height, width]
        size: Sequence[int],  # the teacher's (height, width)
    ) -> Tensor:  # [batch, out_channels, *size]
        return self.refine(_resized(self.middle(self.attention(self.reduce(feature))), size))


class Attention(nn.Module):
    """A feature times a 1x1 convolution of itself to one channel, or times the sigmoid of that, or as it is."""

    def __init__(self, channels: int, kind: str):
        super().__init__()
        if kind not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(map(repr, ATTENTIONS))}, got {kind!r}.")
        self.kind = kind
        self.gate = None if kind == "none" else _conv(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:  # [batch, channels, height, width]
        if self.gate is None:
            return x
        gate = self.gate(x)
        return x * (gate.sigmoid() if self.kind == "sigmoid" else gate)


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return x if x.shape[2:] == tuple(size) else F.interpolate(x, size=tuple(size), mode="nearest")


def _conv(in_channels: int, out_channels: int, kernel: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    nn.init.normal_(conv.weight, std=(2 / (kernel**2 * out_channels)) ** 0.5)
    return conv


def _conv_norm(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(_conv(in_channels, out_channels, kernel), nn.BatchNorm2d(out_channels))


TRANSFORMS = {name: partial(Transform, convolutions=i) for i, name in enumerate(("conv1", "conv2", "conv3"))}
TRANSFORMS["complex"] = Complex
