"""The weights of DistPro's pathways, and a stored process carried over to other pathways."""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kdfast.meta.process import Process, ProcessStep

NORMALISATIONS = ("biased_softmax", "softmax", "l1_biased", "l1", "sigmoid")


class PathwayWeights(nn.Module):
    """One learned parameter a_p a pathway, normalised to weights alpha_p of at least 0::

        biased_softmax  exp(a_p) / (sum_q exp(a_q) + exp(bias)): sums to less than 1
        softmax         exp(a_p) / sum_q exp(a_q)
        l1_biased       |a_p| / (sum_q |a_q| + bias)
        l1              |a_p| / sum_q |a_q|
        sigmoid         1 / (1 + exp(-a_p))

    Args:
        count: number of pathways.
        bias: the paper's g.
        initial: value all `raw` parameters start at; equal to the bias, each weight starts at 1 / (count + 1).
        normalisation: one of the five. The paper's accuracies on CIFAR-100, WRN-28-4 to WRN-16-4, in the order above:
            79.78, 79.41, 79.47, 79.20, 78.80.

    Source: Deng et al., "DistPro", ECCV 2022 (arXiv:2204.05547), table 7. It writes a_p for |a_p| and asks for weights
    of at least 0; its published code takes the absolute value.
    """

    def __init__(self, count: int, bias: float = 1.0, initial: float = 1.0, normalisation: str = "biased_softmax"):
        super().__init__()
        if normalisation not in NORMALISATIONS:
            allowed = ", ".join(map(repr, NORMALISATIONS))
            raise ValueError(f"normalisation must be one of {allowed}, got {normalisation!r}.")
        if normalisation == "l1_biased" and not bias > 0:
            raise ValueError(f"bias must be positive with 'l1_biased', got {bias}.")
        self.raw = nn.Parameter(torch.full((count,), initial))
        self.bias, self.normalisation = bias, normalisation

    def forward(self) -> Tensor:  # [pathways]
        if self.normalisation == "biased_softmax":
            return torch.cat([self.raw, self.raw.new_full((1,), self.bias)]).softmax(0)[:-1]
        if self.normalisation == "softmax":
            return self.raw.softmax(0)
        if self.normalisation == "sigmoid":
            return self.raw.sigmoid()
        size = self.raw.abs()
        return size / (size.sum() + (self.bias if self.normalisation == "l1_biased" else 0.0))


def transfer(
    process: Process,
    pathways: Sequence[str],
    rule: str | Mapping[str, str] | Callable[[str], str] = "depth",
) -> Process:
    """A process for other pathways than it was searched with: of another pair of networks or another data set.

    Each new pathway takes the raw weight of an old one, and its weight divided by the number of new pathways that take
    the same, so that the weights' sum does not grow.

    Args:
        process: the one searched.
        pathways: names of the new ones, "s0-t1-conv2", such as `DistPro.pathways`.
        rule: "depth": feature i of n takes feature i (m - 1) / (n - 1) of the m there were, rounded with halves up,
            an only feature the deepest, and the same transform; or a mapping, or a function, from each new name to an
            old one.

    Raises:
        ValueError: for a name that has no counterpart.

    Example:
        >>> process = transfer(Process.load("cifar.safetensors"), distiller.pathways)
        >>> distiller.follow(process.resample(steps))
    """
    if rule == "depth":
        old, new = ([_parsed(name) for name in names] for names in (process.pathways, pathways))
        counts = [[max(ends[i] for ends in names) for i in (0, 1)] for names in (old, new)]
        sources = [f"s{_nearest(s, counts, 0)}-t{_nearest(t, counts, 1)}-{transform}" for s, t, transform in new]
    elif isinstance(rule, str):
        raise ValueError(f"rule must be 'depth', a mapping or a function of a pathway's name, got {rule!r}.")
    else:
        sources = [(rule.get(name) if isinstance(rule, Mapping) else rule(name)) for name in pathways]
    place = {name: i for i, name in enumerate(process.pathways)}
    for name, source in zip(pathways, sources, strict=True):
        if source not in place:
            raise ValueError(
                f"Pathway {name} takes the weights of {source}, which the process does not have; it has "
                f"{', '.join(process.pathways[:3])}, ... Give a rule that names one of them."
            )
    columns = torch.tensor([place[source] for source in sources])
    shared = torch.bincount(columns, minlength=len(place))[columns]
    carried = Process(pathways)
    for weights, raw in (process.at(step) for step in range(len(process))):
        carried.record(weights[columns] / shared, raw[columns])
    return carried


def constant(pathways: Sequence[str], step: ProcessStep | None = None) -> Process:
    """A process of one step: the paper's baselines of weights that do not change.

    Args:
        pathways: names.
        step: "use alpha_T" is ``process.at(len(process) - 1)``; by default "equally weighted", 1 / pathways each, raw
            weights of 1.
    """
    process, count = Process(pathways), len(pathways)
    if step is None:
        step = ProcessStep(torch.full((count,), 1 / count), torch.ones(count))
    process.record(*step)
    return process


def _parsed(name: str) -> tuple[int, int, str]:
    match = re.fullmatch(r"s(\d+)-t(\d+)-(\w+)", name)
    if match is None:
        raise ValueError(f"A pathway's name must be like 's0-t1-conv2' to be carried over by depth, got {name!r}.")
    return int(match[1]), int(match[2]), match[3]


def _nearest(i: int, last: list[list[int]], end: int) -> int:
    """The feature at the same relative depth; `last` holds the old and the new networks' deepest features."""
    old, new = last[0][end], last[1][end]
    return old if new == 0 else (2 * i * old + new) // (2 * new)
