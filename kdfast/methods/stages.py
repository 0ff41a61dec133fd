"""Networks as stages in a row: cut finer, measured, checked."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdfast.methods.features import as_map

SIDE = 32  # of the image that stages are measured with where no example is given


def first_stages_halved(stages: Sequence[nn.Module], count: int) -> list[nn.Module]:
    """The first `count` stages each cut in two of as many blocks, the first having one more where they are odd.

    Source: the finer stages of Gao et al., 2018 (arXiv:1812.01819), table 3.
    """
    if not 0 <= count <= len(stages):
        raise ValueError(f"halved must be in [0, {len(stages)}], how many of the first stages are cut, got {count}.")
    finer = []
    for i, stage in enumerate(stages):
        if i >= count:
            finer.append(stage)
            continue
        blocks = _blocks(stage)
        if len(blocks) < 2:
            raise ValueError(
                f"Stage {i} cannot be halved: it must be an nn.Sequential of at least 2 modules, got "
                f"{type(stage).__name__} of {len(blocks)}; give the parts one by one."
            )
        middle = (len(blocks) + 1) // 2
        finer += [nn.Sequential(*blocks[:middle]), nn.Sequential(*blocks[middle:])]
    return finer


def _blocks(stage: nn.Module) -> list[nn.Module]:
    """What an nn.Sequential runs one after another, those in it opened too: a stem and a stage."""
    if type(stage) is not nn.Sequential:
        return [stage]
    return [block for child in stage for block in _blocks(child)]


def image_of(network: nn.Module, stages: Sequence[nn.Module], example: Tensor | None) -> Tensor:
    """The example, or a black image: of the `image_shape` the network tells, or of the first convolution's channels."""
    like = next(network.parameters())
    if example is not None:
        return example.to(like)
    if hasattr(network, "image_shape"):
        return like.new_zeros(1, *network.image_shape)
    convolution = next((m for m in stages[0].modules() if isinstance(m, nn.Conv2d)), None)
    if convolution is None:
        raise ValueError(
            "StageByStage needs an example input: the first stage has no convolution to tell its channels."
        )
    return like.new_zeros(1, convolution.in_channels, SIDE, SIDE)


def measured_channels(stages: Sequence[nn.Module], image: Tensor) -> list[int]:
    """Channels after each stage; run in eval mode, so that no statistics change."""
    modes = [(m, m.training) for stage in stages for m in stage.modules()]
    channels, x = [], image.to(next(p for stage in stages for p in stage.parameters()))
    for stage in stages:
        x = stage.eval()(x)
        channels.append(as_map(x).shape[1])
    for module, mode in modes:
        module.training = mode
    return channels


def check_whole(network: nn.Module, stages: Sequence[nn.Module], head: nn.Module, image: Tensor) -> None:
    """Raise where stages and head, one after another, are not the network."""
    held = {id(p) for module in [*stages, head] for p in module.parameters()}
    missing = [name for name, p in network.named_parameters() if id(p) not in held]
    if missing:
        raise ValueError(
            f"The student's stages and head must hold all its parameters; {len(missing)} are in none, {missing[0]} the "
            "first."
        )
    modes = [(m, m.training) for part in (network, *stages, head) for m in part.modules()]
    x = image
    network.eval()
    for module in [*stages, head]:
        x = module.eval()(x)
    expected = network(image)
    for module, mode in modes:
        module.training = mode
    if x.shape != expected.shape or not torch.allclose(x, expected, rtol=1e-3, atol=1e-4):
        raise ValueError("The student's stages and head, run one after another, must give what the student returns.")
