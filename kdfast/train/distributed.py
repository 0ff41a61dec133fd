"""What several processes of one training say to each other; alone, each of these does nothing."""

import os
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from kdfast.meta.processes import average


def start(device: torch.device) -> None:
    """Join the processes of torchrun, by NCCL on GPUs and gloo on CPUs; does nothing without torchrun."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop() -> None:
    """Leave them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean of each gradient over the processes; one that is missing counts as zero where another process has it."""
    parameters = list(parameters)
    # Of stochastic depth each process may have left out other blocks.
    for p, gradient in zip(parameters, average([p.grad for p in parameters], parameters), strict=True):
        p.grad = gradient


@torch.no_grad()
def same_everywhere(module: nn.Module, buffers_only: bool = False) -> None:
    """Give every process the buffers (BatchNorm's statistics) and, at the start, the parameters of the first."""
    if world_size() > 1:
        for x in module.buffers() if buffers_only else (*module.parameters(), *module.buffers()):
            dist.broadcast(x.data, src=0)


def gathered(value: Any) -> list[Any]:
    """`value` of each process, in the order of their ranks, on every one of them."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


class Share:
    """This process's part of each batch of (inputs, targets) that all processes are given alike."""

    def __init__(self, batches: Sized):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        share = slice(rank(), None, world_size())
        for inputs, targets in self.batches:
            yield inputs[share], targets[share]
