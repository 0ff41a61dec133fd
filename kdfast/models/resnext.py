"""ResNeXt-29 for small images: three stages of grouped bottlenecks."""

from functools import partial
from itertools import pairwise

from torch import nn

from kdfast.models.blocks import Bottleneck, stage
from kdfast.models.staged import GlobalAveragePool, StagedNetwork, conv_bn_relu

BLOCKS_A_STAGE = 3  # of three layers each: with stem and linear layer 29


class ResNeXt29(StagedNetwork):
    """ResNeXt-29, cardinality x base_width d: a 3x3 stem of 64 channels, three stages of three bottlenecks.

    Args:
        cardinality: groups of the 3x3 convolutions; the paper's 8.
        base_width: channels of a group in the first stage, doubled in each later one; the paper's 64.
        in_channels: channels of the images.
        classes: number of logits.

    Raises:
        ValueError: for a number below 1.

    Source: Xie, Girshick, Dollár, Tu, He, "Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017,
    section 5.3 (arXiv:1611.05431): 8x64d, 34.4 million parameters.

    Example:
        >>> ResNeXt29(cardinality=2, base_width=64).widths
        (256, 512, 1024)
    """

    def __init__(self, cardinality: int = 8, base_width: int = 64, in_channels: int = 3, classes: int = 10):
        if min(cardinality, base_width) < 1:
            raise ValueError(f"cardinality and base_width must be at least 1, got {cardinality} and {base_width}.")
        widths = (256, 512, 1024)
        inner = [cardinality * base_width * 2**i for i in range(3)]
        super().__init__(
            conv_bn_relu(in_channels, 64),
            [
                stage(partial(Bottleneck, inner=width, groups=cardinality), BLOCKS_A_STAGE, *channels, stride)
                for width, channels, stride in zip(inner, pairwise((64, *widths)), (1, 2, 2), strict=True)
            ],
            nn.Sequential(GlobalAveragePool(), nn.Linear(widths[-1], classes)),
            widths,
        )
