"""Stochastic depth on any residual network, without touching it: its residual branches are scaled by their last layers.

A residual layer is H = g(f(x) + shortcut(x)), and the last layer of the branch f is affine: BatchNorm, convolution,
linear, a layer scale. So b * f(x) is f(x) with that layer's own parameters times b. A sub-network is therefore the
network at other parameters, which `torch.func.functional_call` evaluates: no hooks, no wrappers, and the state dict
stays as it is. A branch that is left out is computed all the same, and multiplied by zero, but where
`kdfast.methods.left_out` takes it out.

Source: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016 (arXiv:1603.09382).
"""

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn

AFFINE = (
    nn.modules.batchnorm._BatchNorm, nn.modules.conv._ConvNd, nn.Linear, nn.LayerNorm, nn.GroupNorm,
)  # fmt: skip


def linear_survival(layers: int, last: float) -> Tensor:  # [layers]
    """p_l = 1 - (l / L) (1 - p_L), l = 1 ... L: the deeper a residual layer, the rarer it stays."""
    return 1 - torch.arange(1, layers + 1) / layers * (1 - last)


def residual_branches(network: nn.Module) -> list[str]:
    """The names of the last layers of the network's residual branches, from the first branch to the last.

    Found are blocks of numbered convolutions and norms (``conv1, bn1, conv2, bn2, ...``; the last of a branch is the
    last that is registered), as those of kdfast, torchvision and timm, and timm's transformer blocks, whose attention
    and MLP are a branch each. DenseNet's layers look alike and are none: what they make is appended, not added.

    Raises:
        ValueError: where there are none, or where a branch ends in what cannot be scaled.
    """
    branches = []
    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        children = dict(module.named_children())
        if {"conv1", "conv2"} <= children.keys() and "Dense" not in type(module).__name__:
            layers = [n for n in children if n.rstrip("0123456789") in ("conv", "bn", "norm")]
            if children.get("se") is not None:
                raise ValueError(
                    f"The branch of {name} ends in {type(children['se']).__name__}, which is not affine, so its last "
                    "layer cannot scale it; choose a network without squeeze and excitation."
                )
            branches.append(prefix + layers[-1])
        elif {"attn", "mlp", "norm1", "norm2"} <= children.keys():
            for scale, branch in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
                scaled = scale in children and next(children[scale].parameters(), None) is not None
                branches.append(prefix + (scale if scaled else branch))
    if not branches:
        raise ValueError(
            f"A {type(network).__name__} has no residual blocks known here; name the last layer of each residual "
            "branch in branches, from the first to the last."
        )
    return branches


def branch_parameters(network: nn.Module, branches: Sequence[str]) -> list[tuple[str, ...]]:
    """The names of the parameters which scale each branch.

    Raises:
        ValueError: for a layer that is not there, or that is not affine in its input.
    """
    found = []
    for branch in branches:
        try:
            layer = network.get_submodule(branch)
        except AttributeError as error:
            raise ValueError(f"branches must name layers of the {type(network).__name__}, got {branch!r}.") from error
        names = tuple(f"{branch}.{name}" for name, _ in layer.named_parameters(recurse=False))
        if not names or not (isinstance(layer, AFFINE) or type(layer).__name__ == "LayerScale"):
            raise ValueError(
                "A branch must end in a layer that its own parameters scale (BatchNorm, convolution, linear, "
                f"LayerScale), got {branch}, a {type(layer).__name__}; name the last such layer in branches."
            )
        found.append(names)
    return found


def scaled(network: nn.Module, names: Sequence[Sequence[str]], factors: Tensor | Sequence[float]) -> dict[str, Tensor]:
    """The parameters, by name, with which the network's branches are multiplied by the factors [branches].

    By attribute: where a meta-step evaluates the network at displaced parameters, they are plain tensors.
    """
    return {
        name: factor * attrgetter(name)(network)
        for branch, factor in zip(names, factors, strict=True)
        for name in branch
    }
