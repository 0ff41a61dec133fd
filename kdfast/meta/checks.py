"""What a meta-step is given, checked before anything runs: one sentence of what was expected and what came."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from kdfast.meta.inner import check_optimizer

SHARDED = ("FullyShardedDataParallel", "FSDPModule")  # by name: their modules are large


def parameters(distiller, optimizer, meta_optimizer) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable inner and meta-parameters, each held by its own optimizer only."""
    check_optimizer(optimizer)
    name = type(distiller).__name__
    for path, module in distiller.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                f"{name}.{path} is wrapped in DistributedDataParallel, which would average gradients a second time; "
                "give the bare module, a meta-step averages over the processes itself."
            )
        if any(base.__name__ in SHARDED for base in type(module).__mro__):
            raise ValueError(
                f"{name}.{path} is sharded by {type(module).__name__}, but a meta-step displaces whole parameters; "
                "give the bare module, a meta-step averages over the processes itself."
            )
    inner = [p for p in distiller.inner_parameters() if p.requires_grad]
    meta = [p for p in distiller.meta_parameters() if p.requires_grad]
    if not meta:
        raise ValueError(
            f"{name} has no meta-parameters to learn; train it with an ordinary step, or yield them in "
            "meta_parameters()."
        )
    held, held_meta = _held(optimizer), _held(meta_optimizer)
    shared = sum(id(p) in held for p in meta)
    if shared:
        raise ValueError(
            f"{shared} of {name}'s {len(meta)} meta-parameters are also in the student's optimizer; build that from "
            "distiller.inner_parameters()."
        )
    missing = sum(id(p) not in held for p in inner)
    if missing:
        raise ValueError(
            f"{missing} of {name}'s {len(inner)} trainable inner parameters are not in the optimizer; build it from "
            "distiller.inner_parameters(), or freeze them with requires_grad_(False)."
        )
    missing = sum(id(p) not in held_meta for p in meta)
    if missing:
        raise ValueError(
            f"{missing} of {name}'s {len(meta)} meta-parameters are not in the meta_optimizer; build it from "
            "distiller.meta_parameters()."
        )
    return inner, meta


def _held(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def options(
    commit: str, validation: str, every: int, fraction: float, radius: float | None, max_norm: float | None
) -> None:
    """The numbers of `MetaKD`, and what goes together."""
    if validation == "rolling" and commit != "reuse":
        raise ValueError(f"validation='rolling' needs commit='reuse', got {commit!r}.")
    if every < 1:
        raise ValueError(f"every must be a number of steps of at least 1, got {every}.")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be a share of the batch in (0, 1], got {fraction}.")
    for name, value in (("radius", radius), ("max_norm", max_norm)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}; leave it out for the default.")


def batch(name: str, given: Any) -> None:
    if not isinstance(given, tuple | list) or len(given) != 2:
        came = f"{len(given)} items" if isinstance(given, tuple | list) else type(given).__name__
        raise TypeError(f"{name} must be a pair (inputs, targets), got {came}.")


def train_batches(given: Any, teacher_outputs: Any) -> tuple[list, list]:
    """(the batches of a step, the teacher's outputs or None for each)."""
    if isinstance(given, list) and given and all(isinstance(x, tuple) for x in given):
        for x in given:
            batch("Each of the train batches", x)
        outputs = [None] * len(given) if teacher_outputs is None else list(teacher_outputs)
        if len(outputs) != len(given):
            raise ValueError(
                f"teacher_outputs must be a list of {len(given)}, one a train batch, got {len(outputs)}; leave it out "
                "to have the teacher asked."
            )
        return given, outputs
    batch("train_batch", given)
    return [given], [teacher_outputs]


def outputs(leaves: list[Any]) -> None:
    """The student's outputs, flattened: all tensors with a gradient must be in sight."""
    for x in leaves:
        hidden = () if isinstance(x, Tensor) or not hasattr(x, "__dict__") else vars(x).items()
        for name, value in hidden:
            if isinstance(value, Tensor) and value.requires_grad:
                kind = type(x).__name__
                raise TypeError(
                    "student_outputs must return tensors, alone or in tuples, lists and dicts, got a "
                    f"{kind} with the tensor {name!r} in it, out of sight; take it apart, or register {kind} with "
                    "torch.utils._pytree.register_pytree_node."
                )


@contextmanager
def unchanged(who: str, what: str, tree: Any) -> Iterator[None]:
    """Raises ValueError where a tensor of the tree is written to: it is needed once more as it was."""
    tensors = [x for x in tree_leaves(tree) if isinstance(x, Tensor) and not x.is_inference()]
    before = [x._version for x in tensors]
    yield
    if any(x._version != version for x, version in zip(tensors, before, strict=True)):
        raise ValueError(
            f"{who} writes to its {what} in place, which the meta-gradient needs a second time as they were; work on a "
            "copy there, as x.clone() or inplace=False make it."
        )
