"""The kinks of a network held where one pass had them, so that another pass differs from it smoothly.

A ReLU network is smooth as long as no unit switches and no maximum moves. Between theta and theta + epsilon w some do:
a share of them in proportion to epsilon, each off by as much as its own tangent, so that a difference errs like
sqrt(epsilon). With every unit held on the side on which the first pass had it, the difference is of the smooth piece
around theta, whose derivative the network's is, and errs like epsilon.

The functions are found as they are called, by a TorchFunctionMode: nothing in the network is changed. A byte is kept
for each of their outputs' elements, eight for a maximum.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def recorded(function: Callable, *args: Any) -> tuple[Any, list[Tensor]]:
    """(what the function returns, the sides on which its units were)."""
    with _Recording() as mode:
        return function(*args), mode.sides


def held(sides: list[Tensor], function: Callable, *args: Any) -> Any:
    """What the function returns with its units on these sides; without autograd.

    Raises:
        RuntimeError: if it takes another path than when they were recorded.
    """
    with _Holding(sides) as mode:
        result = function(*args)
    if mode.used != len(sides):
        raise RuntimeError(_other_path(f"{len(sides)} ReLUs and maxima", str(mode.used)))
    return result


def visible(module: nn.Module) -> bool:
    """Whether the functions that the module calls can be seen: not in compiled code."""
    return not any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in module.modules())


class _Recording(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.sides: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (kind := _KINDS.get(function)) is None:
            return function(*args, **kwargs)
        result, side = kind[0](function, args, kwargs)
        self.sides.append(side)
        return result


class _Holding(TorchFunctionMode):
    def __init__(self, sides: list[Tensor]):
        super().__init__()
        self.sides, self.used = sides, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (kind := _KINDS.get(function)) is None:
            return function(*args, **kwargs)
        if self.used == len(self.sides):
            raise RuntimeError(_other_path(f"{self.used} ReLUs and maxima", "more"))
        side = self.sides[self.used]
        self.used += 1
        return kind[1](side, function, args, kwargs)


def _other_path(expected: str, came: str) -> str:
    return (
        "The student takes another path in the displaced pass than in the training pass: expected "
        f"{expected}, got {came}; a difference of the two would be of two functions. Draw what is random in it from "
        "PyTorch's generators, which are replayed."
    )


# ---------------------------------------------------------------- relu: a side is whether it lets through
def _relu(function, args, kwargs):
    result = function(*args, **kwargs)
    return result, result.detach() > 0


def _held_relu(side, function, args, kwargs):
    x, *others = args or (kwargs["input"],)
    _check(side, x)
    in_place = function.__name__.endswith("_") or kwargs.get("inplace", bool(others and others[0]))
    return x.mul_(side) if in_place else x * side


# ---------------------------------------------------------------- clamp between two bounds: below, between, above
def _clamp(function, args, kwargs):
    result = function(*args, **kwargs)
    low, high, _ = _bounds(function, args, kwargs)
    value = result.detach()
    return result, (value > low).to(torch.int8) + (value >= high).to(torch.int8)


def _held_clamp(side, function, args, kwargs):
    x = args[0] if args else kwargs["input"]
    _check(side, x)
    low, high, in_place = _bounds(function, args, kwargs)
    result = torch.where(side == 0, low, torch.where(side == 2, high, x))
    return x.copy_(result) if in_place else result


def _bounds(function, args, kwargs) -> tuple[float, float, bool]:
    if function is F.relu6:
        return 0.0, 6.0, kwargs.get("inplace", bool(args[1:] and args[1]))
    given = dict(zip(("min_val", "max_val", "inplace"), args[1:], strict=False)) | kwargs
    return given.get("min_val", -1.0), given.get("max_val", 1.0), given.get("inplace", False)


# ---------------------------------------------------------------- max_pool2d: where the maxima are
def _max_pool2d(function, args, kwargs):
    options = {key: value for key, value in kwargs.items() if key != "return_indices"}
    result, places = F.max_pool2d_with_indices(*args, **options)
    return ((result, places) if _asks_places(function, kwargs) else result), places


def _held_max_pool2d(side, function, args, kwargs):
    x = args[0] if args else kwargs["input"]
    if x.shape[:-2] != side.shape[:-2]:
        _check(side, x)
    result = x.flatten(-2).gather(-1, side.flatten(-2)).view(side.shape)
    return (result, side) if _asks_places(function, kwargs) else result


def _asks_places(function, kwargs) -> bool:
    return function is F.max_pool2d_with_indices or kwargs.get("return_indices", False)


def _check(side: Tensor, x: Tensor) -> None:
    if side.shape != x.shape:
        raise RuntimeError(_other_path(f"a map of {tuple(side.shape)}", f"one of {tuple(x.shape)}"))


_KINDS: dict[Callable, tuple[Callable, Callable]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), (_relu, _held_relu)),
    **dict.fromkeys((F.relu6, F.hardtanh), (_clamp, _held_clamp)),
    **dict.fromkeys((F.max_pool2d, F.max_pool2d_with_indices, torch.max_pool2d), (_max_pool2d, _held_max_pool2d)),
}
