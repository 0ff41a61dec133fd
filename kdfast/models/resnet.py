"""The residual networks for small images of He et al.: three stages of basic blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; a 1x1 convolution matches the shortcut where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:  # [batch, in_channels, height, width]
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))  # [batch, channels, height/s, width/s]


class CifarResNet(nn.Module):
    """A residual network of depth 6n+2: a 3x3 stem, three stages of n basic blocks, average pooling, a linear layer.

    The second and third stage halve the resolution, so any input of at least 4x4 pixels works: 32x32 colour as in
    the paper, or 8x8 grey digits with ``in_channels=1`` and narrow ``widths``.

    Args:
        depth: 6n+2 (8, 14, 20, 32, 44, 56, 110, ...).
        widths: channels of the three stages; the stem has the first one's.
        in_channels: channels of the images.
        classes: number of logits.

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

    def __init__(self, depth: int, widths: Sequence[int] = (16, 32, 64), in_channels: int = 3, classes: int = 10):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n+2 with n >= 1 (8, 14, 20, ...), got {depth}.")
        if len(widths) != 3 or min(widths) < 1:
            raise ValueError(f"widths must be three positive numbers of channels, got {tuple(widths)}.")
        self.depth, self.widths = depth, tuple(widths)
        self.conv = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        stages, channels = [], widths[0]
        for stride, width in zip((1, 2, 2), widths, strict=True):
            blocks = []
            for i in range((depth - 2) // 6):
                blocks.append(BasicBlock(channels, width, stride if i == 0 else 1))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(
        self,
        images: Tensor,  # [batch, in_channels, height, width]
        features: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits ``[batch, classes]``; with ``features`` also the three stages' outputs, each ``[batch, width, h, w]``.

        The features are returned, not caught by hooks, so `torch.compile(fullgraph=True)` and `torch.func` see them.
        """
        x = torch.relu(self.bn(self.conv(images)))
        taps = []
        for stage in self.stages:
            x = stage(x)
            taps.append(x)
        logits = self.classifier(x.mean((2, 3)))
        return (logits, taps) if features else logits

    def parts(self) -> tuple[list[nn.Module], nn.Module]:
        """The stages in order, the stem in the first, and the head: run one after another they are the network."""
        first = nn.Sequential(self.conv, self.bn, nn.ReLU(), self.stages[0])
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), self.classifier)
        return [first, *self.stages[1:]], head
