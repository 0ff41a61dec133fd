"""ImageNet's residual networks with a stem for small images: four stages."""

from functools import partial
from itertools import pairwise

from torch import nn

from kdfast.models.blocks import BasicBlock, Bottleneck, stage
from kdfast.models.staged import GlobalAveragePool, StagedNetwork, conv_bn_relu

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class FourStageResNet(StagedNetwork):
    """ResNet-18, -34 (basic blocks), -50, -101, -152 (bottlenecks) whose stem is one 3x3 convolution, without pooling.

    The later three stages halve the resolution: 32x32, 16x16, 8x8 and 4x4 for 32x32 images.

    Args:
        depth: 18, 34, 50, 101 or 152.
        width: channels of the stem and of the first stage's blocks; a bottleneck returns four times its own.
        in_channels: channels of the images.
        classes: number of logits.

    Raises:
        ValueError: for another depth.

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, table 1 (arXiv:1512.03385);
    the stem is that with which papers on CIFAR use them, as MetaDistiller (ECCV 2020) and CRD (ICLR 2020).

    Example:
        >>> FourStageResNet(50, classes=100).widths
        (256, 512, 1024, 2048)
    """

    def __init__(self, depth: int, width: int = 64, in_channels: int = 3, classes: int = 10):
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))}, got {depth}.")
        inner = [width * 2**i for i in range(4)]
        widths = inner if depth < 50 else [4 * channels for channels in inner]
        kinds = [BasicBlock if depth < 50 else partial(Bottleneck, inner=channels) for channels in inner]
        super().__init__(
            conv_bn_relu(in_channels, width),
            [
                stage(kind, count, *channels, stride)
                for kind, count, channels, stride in zip(
                    kinds, BLOCKS[depth], pairwise([width, *widths]), (1, 2, 2, 2), strict=True
                )
            ],
            nn.Sequential(GlobalAveragePool(), nn.Linear(widths[-1], classes)),
            widths,
        )
        self.depth = depth
