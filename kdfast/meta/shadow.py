"""The distiller as it is, evaluated elsewhere: at other parameters, at an earlier random state, leaving no trace."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class RandomState:
    """The random state of the CPU and of some GPUs, as it is when this is made; in a CUDA graph, which draws nothing
    and may not ask, of the CPU."""

    def __init__(self, devices: Iterable[int]):
        self.cpu, self.gpus = torch.get_rng_state(), [(d, torch.cuda.get_rng_state(d)) for d in _readable(devices)]

    def equals(self, other: "RandomState") -> bool:
        """Whether the two are the same."""
        pairs = zip([self.cpu, *(x for _, x in self.gpus)], [other.cpu, *(x for _, x in other.gpus)], strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    def replay(self) -> None:
        """Go back to it, so that dropout drops the same units again."""
        torch.set_rng_state(self.cpu)
        for device, state in self.gpus:
            torch.cuda.set_rng_state(state, device)


def forked(devices: Iterable[int]):
    """A context after which the random state is what it was before."""
    return torch.random.fork_rng(_readable(devices))


def _readable(devices: Iterable[int]) -> list[int]:
    devices = list(devices)
    return [] if devices and torch.cuda.is_current_stream_capturing() else devices


class _Halves(nn.Module):
    """Runs a function of the distiller as a forward, which is what functional_call can evaluate elsewhere."""

    def __init__(self, distiller: nn.Module):
        super().__init__()
        self.distiller = distiller

    def forward(self, function: Callable, *args):
        return function(self.distiller, *args)


class Shadow:
    """The distiller as it is now, to be evaluated at other parameters.

    Each evaluation has its own copy of the buffers as they were when the shadow was made, so that BatchNorm
    statistics and their counters see none of it, and every train pass starts where the real one did.

    Args:
        distiller: the module; it is read, never written.
        inner: its trainable inner parameters.
    """

    def __init__(self, distiller: nn.Module, inner: Sequence[nn.Parameter]):
        self.module = _Halves(distiller)
        places, buffers = _places(self.module)
        self.names = [places[id(p)] for p in inner]
        self.buffers = [(names, b.clone()) for names, b in buffers.values()]
        self._last: list[Tensor] | None = None
        self.devices = sorted({p.device.index for p in inner if p.is_cuda})

    def at(self, values: Sequence[Tensor], function: Callable, *args) -> Any:
        """`function(distiller, *args)` with the inner parameters at `values` (shaped like them)."""
        self._last = [b.clone() for _, b in self.buffers]
        return self._with(self._last, values, function, *args)

    def again(self, values: Sequence[Tensor], function: Callable[[Any], Any]) -> Any:
        """`function(distiller)`, a backward pass of a forward pass at `values`: there what is checkpointed runs again,
        on the buffers of the last evaluation, of which nothing is kept."""
        if self._last is None:
            self._last = [b.clone() for _, b in self.buffers]
        return self._with(self._last, values, function)

    def _with(self, buffers: list[Tensor], values: Sequence[Tensor], function: Callable, *args) -> Any:
        tensors = {}
        for (names, _), b in zip(self.buffers, buffers, strict=True):
            tensors |= dict.fromkeys(names, b)
        for names, value in zip(self.names, values, strict=True):
            tensors |= dict.fromkeys(names, value)
        return functional_call(self.module, tensors, (function, *args), tie_weights=False)


def _places(module: nn.Module) -> tuple[dict[int, list[str]], dict[int, tuple[list[str], Tensor]]]:
    """Where each parameter is, and each buffer with it, by its id: all places if it is tied, but each module once.

    functional_call ties by itself, but leaves a module that is registered twice at the values it was given.
    """
    parameters: dict[int, list[str]] = {}
    buffers: dict[int, tuple[list[str], Tensor]] = {}
    for prefix, owner in module.named_modules():
        prefix = f"{prefix}." if prefix else ""
        for name, p in owner._parameters.items():
            parameters.setdefault(id(p), []).append(prefix + name)
        for name, b in owner._buffers.items():
            if b is not None:
                buffers.setdefault(id(b), ([], b))[0].append(prefix + name)
    return parameters, buffers
