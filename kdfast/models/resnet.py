"""The residual networks for small images of He et al.: three stages of basic blocks."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from kdfast.models.blocks import BasicBlock, stage
from kdfast.models.staged import GlobalAveragePool, StagedNetwork, conv_bn_relu


class CifarResNet(StagedNetwork):
    """A residual network of depth 6n+2: a 3x3 stem, three stages of n basic blocks, average pooling, a linear layer.

    The second and third stage halve the resolution, so any input of at least 4x4 pixels works: 32x32 colour as in
    the paper, or 8x8 grey digits with ``in_channels=1`` and narrow ``widths``.

    Args:
        depth: 6n+2 (8, 14, 20, 32, 44, 56, 110, ...).
        widths: channels of the three stages.
        in_channels: channels of the images.
        classes: number of logits.
        stem: channels of the stem; the first stage's unless given.

    Raises:
        ValueError: for a depth that is not 6n+2, or widths that are not three positive numbers.

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2
    (arXiv:1512.03385). The paper pads the shortcut with zeros (option A); this one projects it (option B).

    Example:
        >>> network = CifarResNet(8, widths=(4, 8, 16), in_channels=1)
        >>> logits, features = network(torch.randn(2, 1, 8, 8), features=True)
        >>> [tuple(f.shape) for f in features]
        [(2, 4, 8, 8), (2, 8, 4, 4), (2, 16, 2, 2)]
    """

    def __init__(
        self,
        depth: int,
        widths: Sequence[int] = (16, 32, 64),
        in_channels: int = 3,
        classes: int = 10,
        stem: int | None = None,
    ):
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n+2 with n >= 1 (8, 14, 20, ...), got {depth}.")
        if len(widths) != 3 or min(widths) < 1:
            raise ValueError(f"widths must be three positive numbers of channels, got {tuple(widths)}.")
        channels = (stem or widths[0], *widths)
        super().__init__(
            conv_bn_relu(in_channels, channels[0]),
            [
                stage(BasicBlock, (depth - 2) // 6, before, width, stride)
                for stride, (before, width) in zip((1, 2, 2), pairwise(channels), strict=True)
            ],
            nn.Sequential(GlobalAveragePool(), nn.Linear(widths[-1], classes)),
            widths,
        )
        self.depth = depth
