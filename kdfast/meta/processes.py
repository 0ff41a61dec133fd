"""Averages over the processes of one training (torchrun); alone, each of these does nothing."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    # Its functions have the process group as a default, taken when it is imported. PyTorch imports it in an optimizer's
    # first step: the group would outlive destroy_process_group, and its threads meet an interpreter that has ended.
    import torch.distributed.nn


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def average(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    """The mean of each over the processes, in place, in one exchange a dtype.

    Args:
        tensors: shaped like `like`; None counts as zero where another process has the tensor, and stays None where
            none has it.
        like: the same on every process.
    """
    tensors = list(tensors)
    if count() == 1 or not tensors:
        return tensors
    present = torch.tensor([x is not None for x in tensors], device=like[0].device, dtype=torch.int32)
    dist.all_reduce(present, dist.ReduceOp.MAX)
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, anywhere in enumerate(present.tolist()):
        if anywhere:
            tensors[i] = torch.zeros_like(like[i]) if tensors[i] is None else tensors[i]
            by_dtype.setdefault(tensors[i].dtype, []).append(i)
    for places in by_dtype.values():
        flat = torch.cat([tensors[i].reshape(-1) for i in places])
        dist.all_reduce(flat)
        flat /= count()
        for i, mean in zip(places, flat.split([tensors[i].numel() for i in places]), strict=True):
            tensors[i].copy_(mean.view(tensors[i].shape))
    return tensors
