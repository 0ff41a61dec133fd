"""MobileNetV2 for small images, of half the width: four stages of inverted residual blocks."""

from torch import Tensor, nn

from kdfast.models.staged import GlobalAveragePool, StagedNetwork, conv_bn_relu

# (expansion, channels at width 1, blocks, stride) a row; the rows of each stage together
STAGES = (
    ((1, 16, 1, 1), (6, 24, 2, 1)),
    ((6, 32, 3, 2),),
    ((6, 64, 4, 2), (6, 96, 3, 1)),
    ((6, 160, 3, 2), (6, 320, 1, 1)),
)
STEM, LAST = 32, 1280


class InvertedResidual(nn.Module):
    """1x1 to more channels, 3x3 a channel, 1x1 to few without ReLU; with a shortcut where the shape stays."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int):
        super().__init__()
        inner = in_channels * expansion
        self.residual = stride == 1 and in_channels == channels
        self.branch = nn.Sequential(
            *conv_bn_relu(in_channels, inner, kernel=1),
            nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:  # [batch, in_channels, height, width]
        out = self.branch(x)
        return x + out if self.residual else out  # [batch, channels, height/s, width/s]


class MobileNetV2(StagedNetwork):
    """MobileNetV2 whose stem alone halves the image before the second stage: 16x16, 8x8, 4x4 and 2x2 for 32x32 images.

    The stages end where the resolution changes; their maps are linear, without ReLU.

    Args:
        width: factor on all channels but the last 1280; 0.5 as in the distillation papers.
        in_channels: channels of the images.
        classes: number of logits.

    Raises:
        ValueError: for a width that leaves a layer without channels.

    Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, table 2
    (arXiv:1801.04381); its strides for CIFAR and half width as in Tian et al., "Contrastive Representation
    Distillation", ICLR 2020 (arXiv:1910.10699). All blocks expand in front, also the first, whose factor is 1.

    Example:
        >>> MobileNetV2(classes=100).widths
        (12, 16, 48, 160)
    """

    def __init__(self, width: float = 0.5, in_channels: int = 3, classes: int = 10):
        if int(16 * width) < 1:
            raise ValueError(f"width must be at least 1/16, got {width}.")
        channels = int(STEM * width)
        stem, stages, widths = conv_bn_relu(in_channels, channels, stride=2), [], []
        for rows in STAGES:
            blocks = []
            for expansion, full, count, stride in rows:
                for i in range(count):
                    blocks.append(InvertedResidual(channels, int(full * width), stride if i == 0 else 1, expansion))
                    channels = int(full * width)
            stages.append(nn.Sequential(*blocks))
            widths.append(channels)
        last = int(LAST * max(width, 1.0))
        head = nn.Sequential(*conv_bn_relu(channels, last, kernel=1), GlobalAveragePool(), nn.Linear(last, classes))
        super().__init__(stem, stages, head, widths)
