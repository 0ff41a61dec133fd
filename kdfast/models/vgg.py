"""VGG for small images: five stages of 3x3 convolutions with BatchNorm, one linear layer."""

from itertools import pairwise

from torch import nn

from kdfast.models.staged import GlobalAveragePool, StagedNetwork

CONVOLUTIONS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)
POOLED = (False, True, True, True, False)  # before the stage; a 32x32 image is 4x4 in the last two


class VGG(StagedNetwork):
    """VGG-8, -11, -13, -16, -19 with BatchNorm, average pooling and one linear layer in place of three.

    A 32x32 image has maps of 32x32, 16x16, 8x8, 4x4 and 4x4.

    Args:
        depth: 8, 11, 13, 16 or 19.
        in_channels: channels of the images.
        classes: number of logits.

    Raises:
        ValueError: for another depth.

    Source: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, table 1
    (arXiv:1409.1556); for CIFAR, and VGG-8, as in Tian et al., "Contrastive Representation Distillation", ICLR 2020.

    Example:
        >>> VGG(13, classes=100).widths
        (64, 128, 256, 512, 512)
    """

    def __init__(self, depth: int, in_channels: int = 3, classes: int = 10):
        if depth not in CONVOLUTIONS:
            raise ValueError(f"depth must be one of {', '.join(map(str, CONVOLUTIONS))}, got {depth}.")
        stages = []
        for count, pooled, (before, width) in zip(
            CONVOLUTIONS[depth], POOLED, pairwise((in_channels, *WIDTHS)), strict=True
        ):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if pooled else []
            for channels in (before, *[width] * (count - 1)):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            stages.append(nn.Sequential(*layers))
        super().__init__(nn.Sequential(), stages, nn.Sequential(GlobalAveragePool(), nn.Linear(512, classes)), WIDTHS)
        self.depth = depth
