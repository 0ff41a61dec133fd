"""Outputs of what is frozen, kept for inputs that come again."""

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor


class FrozenCache:
    """The outputs of frozen networks by their inputs' content, a row each; networks in eval mode treat rows apart.

    Args:
        size: inputs kept at most; those seen first stay. With 0 nothing is kept and no input is looked at. On a GPU
            each call copies its inputs to the host, to know them.
    """

    def __init__(self, size: int):
        if size < 0:
            raise ValueError(f"cache must be at least 0 inputs, got {size}.")
        self.size = size
        self.clear()

    def clear(self) -> None:
        self._rows: dict[str, dict[bytes, Tensor]] = {}

    def __call__(
        self,
        role: str,
        run: Callable[[Tensor], Tensor],
        inputs: Tensor,  # [batch, ...]
    ) -> Tensor:  # [batch, ...]
        """`run(inputs)`, computed only for the inputs that are not kept under this role."""
        if not self.size:
            return run(inputs)
        rows = self._rows.setdefault(role, {})
        host = inputs.detach().cpu().contiguous().flatten(1).view(torch.uint8)
        keys = [blake2b(row.numpy().tobytes(), digest_size=16).digest() for row in host]
        missing = [i for i, key in enumerate(keys) if key not in rows]
        fresh = dict(zip(missing, run(inputs[missing]), strict=True)) if missing else {}
        out = torch.stack([fresh[i] if i in fresh else rows[key] for i, key in enumerate(keys)])
        for i in missing:
            if len(rows) < self.size:
                rows[keys[i]] = out[i].clone()  # not a view: it would keep the whole batch
        return out
