"""Early exits of a network, and the generator that makes soft targets for them of its deeper features."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Exit(nn.Module):
    """From a stage's feature map to logits: layers that shrink it `stride` times, average pooling, a linear layer.

    Args:
        in_channels: of the feature map.
        channels: what the layers lead to: the last stage's, so that the pooled feature is as long as the network's.
        classes: number of logits.
        stride: how many times larger the map is than the last stage's; for "sepconv" a power of two.
        kind: "bottleneck": 1x1 convolution to channels / 4, stride x stride convolution of that stride, 1x1 convolution
            to `channels`, each with BatchNorm and ReLU; "sepconv": attention, then a separable convolution of stride 2
            for each halving; "linear": pooling alone.

    Source: Zhang et al., "Be Your Own Teacher", ICCV 2019 (arXiv:1905.08094), whose text leaves the layers open. Two
    published codes of it fill the gap with "bottleneck" and "sepconv". "linear" is MetaDistiller's for VGG.
    """

    def __init__(self, in_channels: int, channels: int, classes: int, stride: int, kind: str = "bottleneck"):
        super().__init__()
        self.stride = stride
        self.attention, self.layers = None, nn.Identity()
        if kind == "bottleneck":
            middle = max(channels // 4, 1)
            self.layers = nn.Sequential(
                *_conv_norm_relu(in_channels, middle, 1),
                *_conv_norm_relu(middle, middle, stride, stride),
                *_conv_norm_relu(middle, channels, 1),
            )
        elif kind == "sepconv":
            self.attention = nn.Sequential(
                *_separable(in_channels, in_channels, 2), nn.BatchNorm2d(in_channels), nn.ReLU()
            )
            halvings = stride.bit_length() - 1
            widths = [in_channels] * max(halvings, 1) + [channels]
            self.layers = nn.Sequential(
                *(
                    layer
                    for i, (narrow, wide) in enumerate(pairwise(widths))
                    for layer in _separable(narrow, wide, 2 if i < halvings else 1)
                )
            )
        self.classifier = nn.Linear(in_channels if kind == "linear" else channels, classes)

    def forward(self, feature: Tensor) -> Tensor:  # [batch, in_channels, height, width] -> [batch, classes]
        if feature.dim() != 4 or min(feature.shape[2:]) < self.stride:
            raise ValueError(
                f"An exit of stride {self.stride} needs feature maps [batch, channels, height, width] of at least "
                f"{self.stride}x{self.stride}, got {list(feature.shape)}; give smaller strides, or larger images."
            )
        if self.attention is not None:
            gate = F.interpolate(self.attention(feature), feature.shape[2:], mode="bilinear")
            feature = feature * torch.sigmoid(gate)
        return self.classifier(self.layers(feature).mean((2, 3)))


class LabelGenerator(nn.Module):
    """Soft targets for each exit, made of the feature maps of its own and all deeper stages, from the top down.

        G_K = conv1x1(F_K)
        G_k = conv3x3(upsample(G_{k+1}) + conv1x1(F_k)),     k = K-1 ... 1
        T_k = exit(G_k), the logits of stage k's soft target

    Upsampling is bilinear, to the size of F_k. The convolutions have biases and nothing between them, as the equation.

    Args:
        channels: of the K stages' feature maps.
        classes: number of logits.
        strides: of the K-1 exits, see `Exit`.
        width: channels of every G_k.
        kind: of the exits.

    Source: Liu et al., "MetaDistiller", ECCV 2020 (arXiv:2008.12094), equation 5.
    """

    def __init__(self, channels: Sequence[int], classes: int, strides: Sequence[int], width: int, kind: str):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.refine = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in strides)
        self.exits = nn.ModuleList(Exit(width, channels[-1], classes, stride, kind) for stride in strides)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Features of [batch, channels_k, height_k, width_k] to K-1 logits [batch, classes]."""
        fused = self.lateral[-1](features[-1])
        targets = []
        for k in reversed(range(len(self.exits))):
            fused = F.interpolate(fused, features[k].shape[2:], mode="bilinear")
            fused = self.refine[k](fused + self.lateral[k](features[k]))  # [batch, width, height_k, width_k]
            targets.append(self.exits[k](fused))
        return targets[::-1]


def _conv_norm_relu(in_channels: int, channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, channels, kernel, stride, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(channels), nn.ReLU()]


def _separable(in_channels: int, channels: int, stride: int) -> list[nn.Module]:
    """Two depthwise 3x3 convolutions, each with a 1x1 convolution behind it, BatchNorm and ReLU."""
    layers = []
    for wide, step in ((in_channels, stride), (channels, 1)):
        layers.append(nn.Conv2d(in_channels, in_channels, 3, step, padding=1, groups=in_channels, bias=False))
        layers += _conv_norm_relu(in_channels, wide, 1)
    return layers


EXITS = ("bottleneck", "sepconv", "linear")
