"""Where PyTorch's forward mode cannot be differentiated in reverse, so that the head's derivative is taken another way.

The forward-mode formulas of normalisations use the statistics which the forward pass saved as constants: the tangent is
right, its gradient silently wrong. Those of the softmax family overwrite what the reverse sweep needs, and it raises.
Both matter only where meta-parameters come before such a function: its input then depends on them and has a tangent.
"""

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

GAPS = frozenset(
    {
        F.batch_norm, F.layer_norm, F.instance_norm, torch.batch_norm, torch.layer_norm, torch.instance_norm,
        F.softmax, F.log_softmax, F.cross_entropy, F.gumbel_softmax, F.multi_head_attention_forward,
        F.scaled_dot_product_attention, torch.softmax, torch.log_softmax, torch.logsumexp,
        Tensor.softmax, Tensor.log_softmax, Tensor.logsumexp,
    }
)  # fmt: skip


class Gap(Exception):
    """A function of `GAPS` met meta-parameters."""


class Watch(TorchFunctionMode):
    """Inside a dual level: raises `Gap` where a function of `GAPS` takes a tangent, and what needs a gradient."""

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if function in GAPS:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
            moves = any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
            if moves and any(x.requires_grad for x in tensors):
                raise Gap
        return function(*args, **kwargs)
