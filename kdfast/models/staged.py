"""What every network here is: a stem, stages, and a head, one after another."""

from collections.abc import Sequence

from torch import Tensor, nn


class GlobalAveragePool(nn.Module):
    """The mean over height and width."""

    def forward(self, x: Tensor) -> Tensor:  # [batch, channels, height, width] to [batch, channels]
        return x.mean((2, 3))


class StagedNetwork(nn.Module):
    """A network that runs stage by stage and hands out each stage's feature map.

    Args:
        stem: from the images to the first stage.
        stages: each a module of the map before it.
        head: from the last map to the logits; its last layer is linear.
        widths: channels after each stage.

    Convolutions begin normal with variance 2 / fan-out (He et al., 2015), all other layers as PyTorch's.

    Attributes:
        widths: tuple of the channels of the feature maps.
    """

    def __init__(self, stem: nn.Sequential, stages: Sequence[nn.Module], head: nn.Sequential, widths: Sequence[int]):
        super().__init__()
        self.stem, self.stages, self.head = stem, nn.ModuleList(stages), head
        self.widths = tuple(widths)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def classifier(self) -> nn.Linear:
        """The head's linear layer."""
        return self.head[-1]

    def forward(
        self,
        images: Tensor,  # [batch, in_channels, height, width]
        features: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits ``[batch, classes]``; with ``features`` also the stages' outputs, each ``[batch, width, h, w]``.

        The features are returned, not caught by hooks, so `torch.compile(fullgraph=True)` and `torch.func` see them.
        """
        x = self.stem(images)
        taps = []
        for stage in self.stages:
            x = stage(x)
            taps.append(x)
        logits = self.head(x)
        return (logits, taps) if features else logits

    def parts(self) -> tuple[list[nn.Module], nn.Module]:
        """The stages in order, the stem in the first, and the head: run one after another they are the network."""
        return [nn.Sequential(self.stem, self.stages[0]), *self.stages[1:]], self.head


def conv_bn_relu(in_channels: int, channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )
