"""A whole step as one CUDA graph, so that the host's part of it, some thousand launches, is paid once.

A graph is a fixed list of launches on fixed memory. The first WARMUP steps of a kind are therefore ordinary ones, after
which all that is set up on first use is there (momentum, workspaces); the next is recorded; from then on a step's
tensors are copied to where the recorded one read its own, and the graph runs again. A kind is what the launches depend
on beside the contents of memory: shapes, whether the step meta-learns, numbers such as the learning rate. When these
change the kind is recorded anew, so what changes in every step should be a tensor on the GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from kdfast.meta import processes
from kdfast.meta.shadow import RandomState

WARMUP = 3


class Graphs:
    """The graphs of one function of tensors.

    Args:
        devices: indices of the GPUs whose random state must not move.
    """

    def __init__(self, devices: list[int]):
        self._devices = devices
        self._stream = torch.cuda.Stream(devices[0]) if devices else None
        self._seen: dict[Any, int] = {}
        self._recorded: dict[Any, tuple[Any, list[Any], Callable[[], Any]]] = {}
        self._owner: list[Any] = []

    def run(self, function: Callable, kind: Any, numbers: Any, owner: list[Any], *arguments: Any) -> Any:
        """`function(*arguments)`; of a step that is replayed in the graph's own memory, until the next.

        Args:
            kind: of the step, hashable.
            numbers: all that the launches hold as numbers; a graph recorded with others is recorded anew.
            owner: objects with whose replacement memory may have moved; all graphs are then dropped.
            arguments: trees with tensors of these devices.

        Raises:
            ValueError: the function draws random numbers; its results then stand, it has run.
        """
        if [id(x) for x in owner] != [id(x) for x in self._owner]:
            self._seen, self._recorded, self._owner = {}, {}, owner
        leaves, structure = tree_flatten(arguments)
        which = (kind, str(structure), *((x.shape, x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves))
        if self._seen.get(which, 0) < WARMUP:
            self._seen[which] = self._seen.get(which, 0) + 1
            return self._ordinary(function, arguments)
        if which not in self._recorded or self._recorded[which][0] != numbers:
            self._recorded.pop(which, None)  # its memory first
            static = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
            held = tree_unflatten(static, structure)
            torch.clear_autocast_cache()  # weights cast before would be no part of the graph, and stay what they are
            self._recorded[which] = numbers, static, record(lambda: function(*held), self._stream)
        _, static, replay = self._recorded[which]
        for own, given in zip(static, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given, non_blocking=True)
        return replay()

    def _ordinary(self, function: Callable, arguments: tuple) -> Any:
        before = RandomState(self._devices)
        result = beside(lambda: function(*arguments), self._stream)
        if not RandomState(self._devices).equals(before):
            raise ValueError(
                "cuda_graph=True needs a step that draws no random numbers, and this one drew some (dropout?), which a "
                "graph would repeat; leave cuda_graph out. The step itself was taken."
            )
        return result


def beside(function: Callable[[], Any], stream: torch.cuda.Stream) -> Any:
    """On the stream on which it will be recorded: what autograd and the libraries set up belongs to a stream."""
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        result = function()
    current.wait_stream(stream)
    return result


def record(function: Callable[[], Any], stream: torch.cuda.Stream) -> Callable[[], Any]:
    """Record the function, which does not run meanwhile; returns what runs it, and gives its result's own memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = function()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def forget_casts(parameter: Tensor) -> None:
    """Of the weights that autocast has cast and kept: they are of before the step, or memory of its graph."""
    if torch.is_autocast_enabled(parameter.device.type):
        torch.clear_autocast_cache()


def numbers_of(module: nn.Module, *optimizers: Optimizer) -> tuple:
    """What the launches of a step hold as numbers: modes, precision, the optimizers' settings."""
    modes = tuple(m.training for m in module.modules())
    device = next(module.parameters()).device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    settings = tuple(
        (name, value.data_ptr() if isinstance(value, Tensor) else repr(value))
        for optimizer in optimizers
        for group in optimizer.param_groups
        for name, value in group.items()
        if name != "params"
    )
    return modes, autocast, settings


def check(device: torch.device, validation: str, scaler: Any, *optimizers: Optimizer) -> None:
    """Raises ValueError where a step cannot be recorded."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs a student on an NVIDIA GPU, got one on {device}.")
    if validation == "rolling":
        raise ValueError(
            "cuda_graph=True needs validation='batch', got 'rolling', whose steps read the memory of the one before."
        )
    if scaler is not None:
        raise ValueError(
            "cuda_graph=True cannot hold a GradScaler, whose step waits for the device; train in bfloat16, or leave "
            "cuda_graph out."
        )
    if processes.count() > 1:
        raise ValueError(
            f"cuda_graph=True is for one process, got {processes.count()}, whose averages wait for the device."
        )
    for optimizer in optimizers:
        if any(group.get("capturable") is False for group in optimizer.param_groups):
            raise ValueError(
                f"cuda_graph=True needs {type(optimizer).__name__}(capturable=True), which counts its steps on the GPU."
            )
