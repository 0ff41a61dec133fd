"""What a pass does that another is to repeat, so that the two differ smoothly and only in what autograd sees.

*Kinks.* A ReLU network is smooth as long as no unit switches and no maximum moves. Between theta and theta + epsilon
w some do: a share of them in proportion to epsilon, each off by as much as its own tangent, so that a difference errs
like sqrt(epsilon). With every unit held on the side on which the first pass had it, the difference is of the smooth
piece around theta, whose derivative the network's is, and errs like epsilon. Comparisons and choices come out as they
did: a mask, a branch, a routing.

*Constants.* What is detached or made under torch.no_grad() does not move with theta as far as autograd is concerned (a
straight-through estimator, spectral normalisation's singular vectors). The first pass's values stand in.

The functions are found as they are called, by a TorchFunctionMode: nothing in the network is changed. A byte is kept
for each of their outputs' elements, eight for a maximum; of constants a copy. What torch.func transforms is left alone.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from kdfast.ops._door import in_transform


class Path:
    """What is to be repeated of a pass.

    Attributes:
        sides: of its units, in the order of the calls; None where there is none to be on.
        constants: a copy of each, None where nobody kept it; in the order of the calls.
        sixteen: the 16-bit type that it computed in, or None.
    """

    def __init__(self):
        self.sides: list[Tensor | None] = []
        self.constants: list[Tensor | None] = []
        self.sixteen: torch.dtype | None = None


def recorded(function: Callable, *args: Any) -> tuple[Any, Path]:
    """(what the function returns, the path it took)."""
    with torch.enable_grad(), _Recording() as mode:
        result = function(*args)
        mode.leave_block()
    return result, mode.path


def held(path: Path, function: Callable, *args: Any) -> Any:
    """What the function returns on this path; of parameters that need no gradient.

    Raises:
        RuntimeError: if it takes another path than when it was recorded.
    """
    with torch.enable_grad(), _Holding(path) as mode:
        result = function(*args)
    for name, there, used in (
        ("units", path.sides, mode.sides), ("constants", path.constants, mode.constants),
    ):  # fmt: skip
        if used != len(there):
            raise RuntimeError(_other_path(f"{len(there)} {name}", str(used)))
    return result


def visible(module: nn.Module) -> bool:
    """Whether the functions that the module calls can be seen: not in compiled code, nor in other threads."""
    return not any(
        m._compiled_call_impl is not None
        or "_orig_mod" in m._modules
        or isinstance(m, torch.jit.ScriptModule)
        or (isinstance(m, nn.DataParallel) and len(m.device_ids) > 1)
        for m in module.modules()
    )


class ConstantsStay(TorchFunctionMode):
    """In forward mode what is made under torch.no_grad() has no tangent, as it has no gradient."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if not _in_block():
            return function(*args, **(kwargs or {}))
        with forward_ad._set_fwd_grad_enabled(False):
            return function(*args, **(kwargs or {}))


class _Recording(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.path = Path()
        self._block: list[tuple[int, weakref.ref]] = []  # what a block under no_grad has made so far, by its place

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if in_transform() or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if _in_block():
            result = function(*args, **kwargs)
            for x in _tensors(result):
                copied = _is_argument(x, args, kwargs)
                if not copied:
                    self._block.append((len(self.path.constants), weakref.ref(x)))
                self.path.constants.append(x.clone() if copied else None)
            return result
        self.leave_block()
        if (kind := _KINDS.get(function)) is None:
            result = function(*args, **kwargs)
            if isinstance(result, Tensor):
                if result.dtype in (torch.bfloat16, torch.float16):
                    self.path.sixteen = result.dtype
                if function in _DETACHING and torch.is_grad_enabled():
                    self.path.constants.append(result.clone())
            return result
        result, side = kind[0](function, args, kwargs)
        self.path.sides.append(side)
        return result

    def leave_block(self) -> None:
        """Copy what the block made and someone still holds, before it can change."""
        if self._block:
            block, self._block = self._block, []
            with torch.no_grad():
                for place, reference in block:
                    if (x := reference()) is not None:
                        self.path.constants[place] = x.clone()


class _Holding(TorchFunctionMode):
    def __init__(self, path: Path):
        super().__init__()
        self.path, self.sides, self.constants = path, 0, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if in_transform() or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        constants = bool(self.path.constants)  # a compiled function, too, runs without autograd here
        if constants and _in_block():
            result = function(*args, **kwargs)
            if isinstance(result, Tensor):
                return self._constant(result, args, kwargs)
            if made := _tensors(result):
                stored = iter([self._constant(x, args, kwargs) for x in made])
                return type(result)([next(stored) if isinstance(x, Tensor) else x for x in result])
            return result
        if constants and function in _DETACHING and torch.is_grad_enabled():
            return self._constant(function(*args, **kwargs), (), {})
        if (kind := _KINDS.get(function)) is None:
            return function(*args, **kwargs)
        if self.sides == len(self.path.sides):
            raise RuntimeError(_other_path(f"{self.sides} units", "more"))
        side = self.path.sides[self.sides]
        self.sides += 1
        return function(*args, **kwargs) if side is None else kind[1](side, function, args, kwargs)

    def _constant(self, made: Tensor, args, kwargs) -> Tensor:
        if self.constants == len(self.path.constants):
            raise RuntimeError(_other_path(f"{self.constants} constants", "more"))
        stored = self.path.constants[self.constants]
        self.constants += 1
        if stored is None:
            return made
        _check(stored, made)
        return made.copy_(stored) if _is_argument(made, args, kwargs) else stored.clone()


def _in_block() -> bool:
    """Whether this is under torch.no_grad(); a Function's forward, which also is, switches forward mode off as well."""
    return not torch.is_grad_enabled() and torch._C._is_fwd_grad_enabled()


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [x for x in result if isinstance(x, Tensor)] if isinstance(result, tuple | list) else []


def _is_argument(x: Tensor, args, kwargs) -> bool:
    return x is kwargs.get("out") or any(x is given for given in args)


def _other_path(expected: str, came: str) -> str:
    return (
        "The student takes another path in the displaced pass than in the training pass: expected "
        f"{expected}, got {came}; a difference of the two would be of two functions. Draw what is random in it from "
        "PyTorch's generators, which are replayed, and compile it as a whole or not at all; or take tangent='jvp'."
    )


def _check(side: Tensor, x: Tensor) -> None:
    if side.shape != x.shape:
        raise RuntimeError(_other_path(f"a map of {tuple(side.shape)}", f"one of {tuple(x.shape)}"))


# ---------------------------------------------------------------- relu: a side is whether it lets through
def _relu(function, args, kwargs):
    result = function(*args, **kwargs)
    return result, result.detach() > 0


def _held_relu(side, function, args, kwargs):
    x, *others = args or (kwargs["input"],)
    _check(side, x)
    in_place = function.__name__.endswith("_") or kwargs.get("inplace", bool(others and others[0]))
    return x.mul_(side) if in_place else x * side


# ---------------------------------------------------------------- pieces: below the first bound, between, above
def _pieces(function, args, kwargs):
    x, bounds, _, _ = _described(function, args, kwargs)
    # Of what comes in, which the function may overwrite. Integers have no sides, nor have complex numbers.
    side = _side(x.detach(), *bounds) if x.is_floating_point() else None
    return function(*args, **kwargs), side


def _side(x: Tensor, low, high) -> Tensor:
    side = torch.ones_like(x, dtype=torch.int8) if low is None else (x > low).to(torch.int8)
    return side if high is None else side + (x >= high)


def _held_pieces(side, function, args, kwargs):
    x, _, pieces, in_place = _described(function, args, kwargs)
    _check(side, x)
    below, between, above = (piece(x) if callable(piece) else piece for piece in pieces)
    result = between if below is None else torch.where(side == 0, below, between)
    if above is not None:
        result = torch.where(side == 2, above, result)
    return x.copy_(result) if in_place else result


def _described(function, args, kwargs):
    """(the input, (low, high), the three pieces, whether it is in place)."""
    names, describe = _PIECES[function]
    given = dict(zip(("input", *names), args, strict=False)) | kwargs
    if "self" in given:
        given["input"] = given["self"]
    in_place = function.__name__.endswith("_") or given.get("inplace", False)
    return given["input"], *describe(given), in_place


def _bounded(low, high):
    return (low, high), (low, lambda x: x, high)


def _leaky(slope):
    return (0.0, None), (lambda x: slope(x) if callable(slope) else slope * x, lambda x: x, None)


def _weighted(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x * (weight.view(-1, *[1] * (x.dim() - 2)) if weight.numel() > 1 else weight)


def _clamped(given):
    return _bounded(given.get("min"), given.get("max"))


_PIECES: dict[Callable, tuple[tuple[str, ...], Callable]] = {
    F.relu6: (("inplace",), lambda given: _bounded(0.0, 6.0)),
    F.hardtanh: (
        ("min_val", "max_val", "inplace"),
        lambda given: _bounded(given.get("min_val", -1.0), given.get("max_val", 1.0)),
    ),
    **dict.fromkeys(
        (F.leaky_relu, F.leaky_relu_),
        (("negative_slope", "inplace"), lambda given: _leaky(given.get("negative_slope", 0.01))),
    ),
    **dict.fromkeys((torch.prelu, Tensor.prelu), (("weight",), lambda given: _leaky(_weighted(given["weight"])))),
    **dict.fromkeys(
        (torch.abs, torch.abs_, Tensor.abs, Tensor.abs_, Tensor.__abs__),
        ((), lambda given: ((0.0, None), (lambda x: -x, lambda x: x, None))),
    ),
    F.hardswish: (("inplace",), lambda given: ((-3.0, 3.0), (0.0, lambda x: x * (x + 3) / 6, lambda x: x))),
    F.hardsigmoid: (("inplace",), lambda given: ((-3.0, 3.0), (0.0, lambda x: x / 6 + 0.5, 1.0))),
    **dict.fromkeys(
        (torch.clamp, torch.clamp_, Tensor.clamp, Tensor.clamp_, torch.clip, torch.clip_, Tensor.clip, Tensor.clip_),
        (("min", "max"), _clamped),
    ),
    **dict.fromkeys((torch.clamp_min, torch.clamp_min_, Tensor.clamp_min, Tensor.clamp_min_), (("min",), _clamped)),
    **dict.fromkeys((torch.clamp_max, torch.clamp_max_, Tensor.clamp_max, Tensor.clamp_max_), (("max",), _clamped)),
}


# ---------------------------------------------------------------- max_pool: where the maxima are
def _max_pool(function, args, kwargs):
    with_indices, _ = _POOLS[function]
    options = {key: value for key, value in kwargs.items() if key != "return_indices"}
    result, places = with_indices(*args, **options)
    return ((result, places) if _asks_places(function, kwargs) else result), places


def _held_max_pool(side, function, args, kwargs):
    x = args[0] if args else kwargs["input"]
    dims = _POOLS[function][1]
    if x.shape[:-dims] != side.shape[:-dims]:
        _check(side, x)
    if side.dim() == 4 and side.is_contiguous(memory_format=torch.channels_last) and not side.is_contiguous():
        last = side.permute(0, 2, 3, 1)  # in memory's order, and so is the result
        result = x.permute(0, 2, 3, 1).flatten(1, 2).gather(1, last.flatten(1, 2)).view(last.shape).permute(0, 3, 1, 2)
    else:
        result = x.flatten(-dims).gather(-1, side.flatten(-dims)).view(side.shape)
    return (result, side) if _asks_places(function, kwargs) else result


def _asks_places(function, kwargs) -> bool:
    return function is _POOLS[function][0] or kwargs.get("return_indices", False)


_POOLS: dict[Callable, tuple[Callable, int]] = {  # the function that also gives the places; how many dimensions
    **dict.fromkeys((F.max_pool1d, F.max_pool1d_with_indices, torch.max_pool1d), (F.max_pool1d_with_indices, 1)),
    **dict.fromkeys((F.max_pool2d, F.max_pool2d_with_indices, torch.max_pool2d), (F.max_pool2d_with_indices, 2)),
    **dict.fromkeys((F.max_pool3d, F.max_pool3d_with_indices, torch.max_pool3d), (F.max_pool3d_with_indices, 3)),
    **dict.fromkeys(
        (F.adaptive_max_pool2d, F.adaptive_max_pool2d_with_indices), (F.adaptive_max_pool2d_with_indices, 2)
    ),
}


# ---------------------------------------------------------------- what is decided: the decision
def _decision(function, args, kwargs):
    result = function(*args, **kwargs)
    return result, _copy(result) if any(_is_float(x) for x in (*args, *kwargs.values())) else None


def _held_decision(side, function, args, kwargs):
    return _copy(side)


def _copy(decided: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, decided)


def _larger(function, args, kwargs):
    a, b = _pair(args, kwargs)
    return function(a, b), a.detach() > b.detach()


def _held_larger(side, function, args, kwargs):
    a, b = _pair(args, kwargs)
    return torch.where(side, a, b) if function in (torch.maximum, Tensor.maximum) else torch.where(side, b, a)


def _pair(args, kwargs) -> tuple[Tensor, Tensor]:
    return (*args, *kwargs.values())[:2]


def _selection(function, args, kwargs):
    result = function(*args, **kwargs)
    return result, result[1] if isinstance(result, tuple) else None


def _held_selection(side, function, args, kwargs):
    name, place, default = _SELECTIONS[function]
    x = args[0] if args else kwargs["input"]
    dim = kwargs.get("dim", args[place] if len(args) > place else default)
    whole = side if side.dim() == x.dim() else side.unsqueeze(dim)
    return getattr(torch.return_types, name)((x.gather(dim, whole).view(side.shape), side))


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


_SELECTIONS: dict[Callable, tuple[str, int, int | None]] = {  # its name; the place of dim, and what it is by default
    function: (name, place, default)
    for name, place, default in (("max", 1, None), ("min", 1, None), ("sort", 1, -1), ("topk", 2, -1))
    for function in (getattr(torch, name), getattr(Tensor, name))
}
_DECISIONS = [
    getattr(owner, name)
    for name in ("gt", "ge", "lt", "le", "eq", "ne", "argmax", "argmin", "argsort", "nonzero")
    for owner in (torch, Tensor)
] + [getattr(Tensor, f"__{name}__") for name in ("gt", "ge", "lt", "le", "eq", "ne")]
_KINDS: dict[Callable, tuple[Callable, Callable]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), (_relu, _held_relu)),
    **dict.fromkeys(_PIECES, (_pieces, _held_pieces)),
    **dict.fromkeys(_POOLS, (_max_pool, _held_max_pool)),
    **dict.fromkeys(_DECISIONS, (_decision, _held_decision)),
    **dict.fromkeys(_SELECTIONS, (_selection, _held_selection)),
    **dict.fromkeys((torch.maximum, torch.minimum, Tensor.maximum, Tensor.minimum), (_larger, _held_larger)),
}
_DETACHING = {torch.detach, Tensor.detach, Tensor.data.__get__}
