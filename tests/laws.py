"""The law suite: what every op must satisfy, on values.

A test file describes its op once and inherits the laws:

    class TestKdKl(Laws):
        op = LawfulOp(name=..., call=..., truth=..., eager=..., inputs=..., variants=..., raw=...)

`call`, `truth` and `eager` take the same differentiable tensors and the variant's keyword arguments and return a
tensor (any shape). `truth` is the definition, run in fp64. `eager` is what a PyTorch user would write, run in the
storage dtype; None where PyTorch has no such thing. No law asks only whether something ran.

Where there is an NVIDIA GPU every law is there twice, the second time with `call` on the GPU (conftest.py); `truth`
and `eager` stay on the CPU. `make fuzz` runs the law of random cases on thousands of them instead of 60:
KDFAST_FUZZ_CASES says how many, KDFAST_FUZZ_SEED which; a seed that was not given is drawn and printed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves as leaves
from torch.utils._pytree import tree_map_only

from kdfast import _native
from tests.fuzz import on_random_cases

SANITIZED = bool(_native.build_info.get("sanitizers"))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@dataclass
class LawfulOp:
    name: str
    call: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    eager: Callable[..., Tensor] | None
    # (generator, shape, dtype, variant) -> (differentiable tensors, keyword arguments of the call)
    inputs: Callable[..., tuple[tuple[Tensor, ...], dict[str, Any]]]
    variants: dict[str, dict[str, Any]]
    shapes: dict[str, tuple[int, ...]]  # id (the regime it covers) -> shape
    small: tuple[int, ...]  # for numerical differentiation
    raw: Callable[[], list[tuple[Any, tuple]]]  # (dispatcher op, arguments) for opcheck
    draw: st.SearchStrategy = field(default=None)  # (shape, variant) pairs for the random law
    dtypes: list[torch.dtype] = field(default_factory=lambda: DTYPES)  # of the law of random cases
    # id -> ((tensors, kwargs) -> the same with extreme values or masked entries, their spread in a row)
    extremes: dict[str, tuple[Callable, float]] = field(default_factory=dict)
    # shapes that every one of the extremes can be made of
    extreme_shapes: st.SearchStrategy = field(default_factory=lambda: st.just((6, 37)))
    device: ClassVar[str] = "cpu"  # where `call` runs: the laws' fixture `device`

    def make(self, shape, dtype, variant, seed=0, change=None):
        """Inputs on `device`, the same numbers on each; `change` is one of the extremes'."""
        generator = torch.Generator().manual_seed(seed)
        tensors, kwargs = self.inputs(generator, shape, dtype, variant)
        if change is not None:
            tensors, kwargs = change(tuple(tensors), dict(kwargs))
        tensors, kwargs = tree_map_only(Tensor, lambda x: x.to(self.device), (tuple(tensors), kwargs))
        return tuple(t.detach().requires_grad_() for t in tensors), kwargs


def gradients(function, tensors, kwargs, seed=1):
    """(value, gradients), on the CPU, under a random cotangent, so that grad_output is not all ones."""
    value = function(*tensors, **kwargs)
    cotangent = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    used = [t for t in tensors if t.requires_grad]
    grads = [None] * len(used)
    if used and value.requires_grad:  # what learns may be left out of it
        grads = torch.autograd.grad(value, used, cotangent.to(value), allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(used, grads, strict=True)]
    return value.detach().cpu(), [g.cpu() for g in grads]


def as_dtype(tensors, kwargs, dtype):
    """The same numbers on the CPU in another dtype: what `truth` and `eager` are given."""

    def convert(x):
        return x.detach().to("cpu", dtype) if x.is_floating_point() else x.cpu()

    tensors, kwargs = tree_map_only(Tensor, convert, (tuple(tensors), kwargs))
    return tuple(t.requires_grad_() for t in tensors), kwargs


def error(values: list[Tensor], truths: list[Tensor]) -> float:
    """Relative error in the Euclidean norm, over all of the given draws together."""
    difference = sum((v.double() - t.double()).square().sum() for v, t in zip(values, truths, strict=True)).sqrt()
    return (difference / sum(t.double().square().sum() for t in truths).sqrt().clamp(min=1e-30)).item()


def assert_as_exact_as_eager(got, truth, eager, dtype, what):
    """At most twice the error of PyTorch in the same dtype, over a few draws, as a single number can be exact by luck.
    Eager counts with at least 4 ulp of the dtype, its own median on these shapes. In fp64 the definition is itself
    rounded in fp64: there 1e-12 is allowed in any case. A sanitized build sums in one lane instead of sixteen, which
    costs fp32 sums two bits."""
    ours = error(got, truth)
    theirs = error(eager, truth) if eager[0] is not None else 0.0
    floor = 5e-13 if dtype == torch.float64 else (8 if SANITIZED else 2) * torch.finfo(dtype).eps
    allowed = 2 * max(theirs, floor)
    assert ours <= allowed, f"{what}: relative error {ours:.2e}, PyTorch's {theirs:.2e}, allowed {allowed:.2e}"


def close(got, want, rtol=1e-9, atol=1e-11):
    """For fp64 against fp64: two ways to write one formula."""
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


# The same numbers, [rows, classes] or [rows], lying otherwise in memory.
LAYOUTS = {
    "columns first": lambda x: x.T.contiguous().T if x.dim() == 2 else x,
    "every second column": lambda x: torch.stack([x, (x + 1).to(x.dtype)], -1)[..., 0],
    "rows of a wider tensor": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
}


def laid(tensor, layout):
    """The tensor in one of the LAYOUTS, a leaf as it was. A number has but one layout."""
    if layout is None or tensor.dim() == 0:
        return tensor
    return LAYOUTS[layout](tensor.detach()).requires_grad_(tensor.requires_grad)


# ---------------------------------------------------------------- random cases
@dataclass
class Case:
    shape: tuple[int, ...]
    variant: dict[str, Any]
    dtype: torch.dtype
    extreme: str | None
    layouts: tuple[str | None, str | None]  # of the first tensor, and of the others
    learns: str  # which tensors require a gradient: kernels may take another path
    seed: int


@st.composite
def random_cases(draw, op: LawfulOp):
    shape, variant = draw(op.draw)
    dtype = draw(st.sampled_from(op.dtypes))
    extreme = draw(st.none() | st.sampled_from(list(op.extremes))) if op.extremes else None
    if extreme is not None:
        shape = draw(op.extreme_shapes)
    layouts = draw(st.tuples(*[st.none() | st.sampled_from(list(LAYOUTS))] * 2))
    learns = draw(st.sampled_from(["all", "the first", "none"]))
    return Case(shape, variant, dtype, extreme, layouts, learns, draw(st.integers(0, 2**31)))


def check_case(op: LawfulOp, case: Case) -> bool:
    """Values and gradients against fp64 truth of the very same numbers. Returns whether the rule alone held.

    The rule: no entry is off by more than 1e-9 (fp64 arithmetic) or 32 ulp (fp32) of the largest entry; entries stored
    in 16 bits by two ulp of their own more: a gradient made in the forward sweep is rounded again when it is scaled.
    Where a sum cancels deeper in this draw, twice PyTorch's error is right too, in the arithmetic type and not the
    storage type; and so are four roundings of the terms (of a product of three, and of the sum it goes into), as
    autograd on its other way may meet an exact zero: terms of the spread in a row (1 where it is not extreme), and in
    the sums over a row (what has fewer dimensions than the first tensor: values, gradients of temperatures) those of
    test_extremes, entropies times the square of a temperature.
    """
    change, spread = op.extremes[case.extreme] if case.extreme else (None, 1)
    tensors, kwargs = op.make(case.shape, case.dtype, case.variant, case.seed, change)
    hypothesis.assume(not any((t.isnan() | t.isposinf()).any() for t in tensors))  # more than the dtype can hold
    first, *rest = (laid(t, case.layouts[min(i, 1)]) for i, t in enumerate(tensors))
    first = first if case.learns != "none" else first.detach()
    learning = (first, *(t if case.learns == "all" else t.detach() for t in rest))
    got = leaves(gradients(op.call, learning, kwargs))
    exact = leaves(gradients(op.truth, *as_dtype(tensors, kwargs, torch.float64)))
    arithmetic = torch.float64 if case.dtype == torch.float64 else torch.float32
    part = 1e-9 if arithmetic == torch.float64 else 32 * torch.finfo(arithmetic).eps
    theirs = None
    for i, (x, truth) in enumerate(zip(got, exact, strict=False)):
        what = "value" if i == 0 else f"gradient {i - 1}"
        assert x.shape == truth.shape, f"{what}: shape {tuple(x.shape)}, expected {tuple(truth.shape)}"
        assert x.dtype == (arithmetic if i == 0 else tensors[i - 1].dtype), f"{what}: {x.dtype}"
        if not (off := largest(x, truth, part)):
            continue
        theirs = errors_of_pytorch(op, tensors, kwargs, arithmetic, exact) if theirs is None else theirs
        terms = 4 * max(spread, 1) if x.dim() == tensors[0].dim() else 16 * max(spread, 10)
        terms *= 2 if arithmetic == torch.float64 else 1  # the truth is rounded as well
        assert off <= max(2 * theirs[i], torch.finfo(arithmetic).eps * terms), (
            f"{what}: off by {off:.2e}, PyTorch in {arithmetic} by {theirs[i]:.2e}, largest entry "
            f"{truth.abs().max():.2e}"
        )
    return theirs is None


def largest(x: Tensor, truth: Tensor, part: float) -> float:
    """The largest error, beyond the rounding to storage, where one is against the rule of check_case, else 0."""
    limits = torch.finfo(x.dtype)
    truth = truth.to(x.dtype).double()  # infinite where the storage type ends
    off = torch.where(x == truth, 0, (x - truth).abs())  # infinities of one sign are equal
    if limits.bits < 32:
        off = (off - 2 * limits.eps * truth.abs().clamp(min=limits.smallest_normal)).clamp(min=0)
    finite = truth[truth.isfinite()].abs()
    allowed = part * finite.max() if finite.numel() else 0.0
    return 0.0 if (off <= allowed).all() else off.nan_to_num(torch.inf, torch.inf).max().item()


def errors_of_pytorch(op, tensors, kwargs, dtype, exact) -> list[float]:
    """The largest error in each output of the definition and of `eager`, composed of PyTorch's ops in `dtype`, over
    inputs that differ by a rounding: one draw can be exact by luck. `eager` is left out where in fp64 it does not
    say the same as the definition, as on shapes that it was not written for."""
    ways = [op.truth]
    try:
        if op.eager is not None:
            for wide, truth in zip(
                leaves(gradients(op.eager, *as_dtype(tensors, kwargs, torch.float64))), exact, strict=True
            ):
                close(wide, truth, rtol=1e-6, atol=1e-9)
            ways.append(op.eager)
    except (AssertionError, RuntimeError, ValueError, IndexError):
        pass
    errors = [0.0] * len(exact)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        wide, options = as_dtype(tensors, kwargs, torch.float64)
        near = [
            t * (1 + torch.finfo(dtype).eps * (torch.rand(t.shape, generator=generator, dtype=t.dtype) - 0.5))
            for t in wide
        ]
        for way in ways:
            for i, x in enumerate(leaves(gradients(way, *as_dtype(near, options, dtype)))):
                off = torch.where(x == exact[i], 0, (x - exact[i]).abs())
                errors[i] = max(errors[i], off.max().item() if off.numel() else 0.0)
    return errors


class Laws:
    op: LawfulOp

    @pytest.fixture(autouse=True)
    def device(self, request, monkeypatch):
        """Parametrized where there is a GPU, in conftest.py."""
        monkeypatch.setattr(LawfulOp, "device", getattr(request, "param", "cpu"))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_values_and_gradients(self, variant, shape, dtype):
        draws = []  # of (value, *gradients): ours, exact, eager
        for seed in range(4):
            tensors, kwargs = self.op.make(shape, dtype, variant, seed)
            value, grads = gradients(self.op.call, tensors, kwargs)
            for tensor, grad in zip(tensors, grads, strict=True):
                assert grad.dtype == tensor.dtype
                assert grad.shape == tensor.shape
            exact_value, exact_grads = gradients(self.op.truth, *as_dtype(tensors, kwargs, torch.float64))
            eager_value, eager_grads = None, [None] * len(grads)
            if self.op.eager is not None:
                eager_value, eager_grads = gradients(self.op.eager, *as_dtype(tensors, kwargs, dtype))
            draws.append(
                list(zip((value, *grads), (exact_value, *exact_grads), (eager_value, *eager_grads), strict=True))
            )
        for i, together in enumerate(zip(*draws, strict=True)):
            what = "value" if i == 0 else f"gradient {i - 1}"
            assert_as_exact_as_eager(*zip(*together, strict=True), dtype, what)

    def test_gradcheck(self, variant):
        tensors, kwargs = self.op.make(self.op.small, torch.float64, variant)
        assert torch.autograd.gradcheck(
            lambda *t: self.op.call(*t, **kwargs), tensors, check_forward_ad=True, check_batched_grad=True,
            check_batched_forward_grad=True,
        )  # fmt: skip

    def test_gradgradcheck(self, variant):
        tensors, kwargs = self.op.make(self.op.small, torch.float64, variant)
        assert torch.autograd.gradgradcheck(
            lambda *t: self.op.call(*t, **kwargs), tensors, check_fwd_over_rev=True, check_rev_over_rev=True
        )

    def test_first_argument_alone(self, variant):
        """The common case (a student against constants) may take its own path through the kernel."""
        tensors, kwargs = self.op.make(self.op.small, torch.float64, variant)
        rest = [t.detach() for t in tensors[1:]]
        assert torch.autograd.gradcheck(lambda t: self.op.call(t, *rest, **kwargs), tensors[:1])
        assert torch.autograd.gradgradcheck(lambda t: self.op.call(t, *rest, **kwargs), tensors[:1])

    def test_backward_twice_and_scaled(self, variant):
        tensors, kwargs = self.op.make(self.op.small, torch.float64, variant)
        one = tensors[0]
        rest = [t.detach() for t in tensors[1:]]
        before = [t.detach().clone() for t in tensors]
        value = (3 * self.op.call(one, *rest, **kwargs)).sum()
        (first,) = torch.autograd.grad(value, one, retain_graph=True)
        kept = first.clone()
        (second,) = torch.autograd.grad(value, one)
        close(first, kept, 0, 0)  # the second backward has not written into the first's result
        close(second, first)
        for t, b in zip(tensors, before, strict=True):
            close(t.detach(), b, 0, 0)  # inputs are left alone
        exact_tensors, exact_kwargs = as_dtype(tensors, kwargs, torch.float64)
        exact = torch.autograd.grad(3 * self.op.truth(*exact_tensors, **exact_kwargs).sum(), exact_tensors[0])[0]
        close(first.cpu(), exact)

    def test_runs_the_same_twice(self, variant, shape):
        tensors, kwargs = self.op.make(shape, torch.float32, variant)
        first, second = (gradients(self.op.call, tensors, kwargs) for _ in range(2))
        for a, b in zip(leaves(first), leaves(second), strict=True):
            close(a, b, 0, 0)

    def test_vmap_equals_a_loop(self, variant):
        made = [self.op.make(self.op.small, torch.float64, variant, seed) for seed in range(3)]
        kwargs = made[0][1]
        stacked = [torch.stack([m[0][i].detach() for m in made]) for i in range(len(made[0][0]))]

        def value_and_grads(*tensors):
            def total(*t):
                return self.op.call(*t, **kwargs).sum()

            return torch.func.grad_and_value(total, argnums=tuple(range(len(tensors))))(*tensors)

        together = leaves(torch.func.vmap(value_and_grads)(*stacked))
        one_by_one = [leaves(value_and_grads(*(s[i] for s in stacked))) for i in range(3)]
        for i, batch in enumerate(together):
            close(batch, torch.stack([o[i] for o in one_by_one]))
        # the first argument alone mapped, over its last but one dimension
        moved = stacked[0].movedim(0, -2)
        rest = [s[0] for s in stacked[1:]]
        mapped = torch.func.vmap(lambda t: self.op.call(t, *rest, **kwargs), in_dims=moved.dim() - 2)(moved)
        close(mapped, torch.stack([self.op.call(stacked[0][i], *rest, **kwargs) for i in range(3)]))

    @pytest.mark.parametrize(
        "transform",
        [
            pytest.param(lambda f, n: torch.func.jacrev(f, argnums=n), id="jacrev"),
            pytest.param(lambda f, n: torch.func.jacfwd(f, argnums=n), id="jacfwd"),
            pytest.param(lambda f, n: torch.func.jacfwd(torch.func.jacrev(f, argnums=n), argnums=n), id="hessian"),
            pytest.param(lambda f, n: torch.func.jacrev(torch.func.jacrev(f, argnums=n), argnums=n), id="rev-rev"),
            pytest.param(lambda f, n: torch.func.jacrev(torch.func.jacfwd(f, argnums=n), argnums=n), id="rev-fwd"),
        ],
    )
    def test_torch_func(self, variant, transform):
        tensors, kwargs = self.op.make(self.op.small, torch.float64, variant)
        argnums = tuple(range(len(tensors)))
        got = transform(lambda *t: self.op.call(*t, **kwargs).sum(), argnums)(*(t.detach() for t in tensors))
        exact_tensors, exact_kwargs = as_dtype(tensors, kwargs, torch.float64)
        want = transform(lambda *t: self.op.truth(*t, **exact_kwargs).sum(), argnums)(
            *(t.detach() for t in exact_tensors)
        )
        assert max(leaf.abs().max() for leaf in leaves(want)) > 0
        for a, b in zip(leaves(got), leaves(want), strict=True):
            close(a.cpu(), b)

    def test_strides(self, variant, shape):
        tensors, kwargs = self.op.make(shape, torch.float32, variant)
        value, grads = gradients(self.op.call, tensors, kwargs)
        for name in LAYOUTS:
            everything = tuple(laid(t, name) for t in tensors)
            kinds = {"all": (everything, kwargs)}
            for i in range(len(tensors)):  # each alone, the others contiguous
                kinds[f"input {i}"] = ((*tensors[:i], everything[i], *tensors[i + 1 :]), kwargs)
            kinds["labels, weights"] = (tensors, tree_map_only(Tensor, lambda x, name=name: laid(x, name), kwargs))
            for which, (given, options) in kinds.items():
                got = gradients(self.op.call, given, options)
                for a, b in zip(leaves(got), leaves((value, grads)), strict=True):
                    msg = lambda m, name=name, which=which: f"{name}, {which}: {m}"  # noqa: E731
                    torch.testing.assert_close(a, b, rtol=0, atol=0, msg=msg)

    def test_extremes(self, variant, extreme):
        """Against fp64 truth of the very same numbers, in fp64 and fp32: finite where the definition is. `spread` is
        the largest difference in a row: a gradient in a temperature is a sum of terms of that size squared."""
        change, spread = self.op.extremes[extreme]
        for dtype, rtol, unit in ((torch.float64, 1e-9, 1e-14), (torch.float32, 2e-5, 2e-6)):
            atol = unit * max(spread, 10)
            tensors, kwargs = self.op.make((6, 37), dtype, variant, change=change)
            value, grads = gradients(self.op.call, tensors, kwargs)
            exact_value, exact_grads = gradients(self.op.truth, *as_dtype(tensors, kwargs, torch.float64))
            scale = exact_value[exact_value.isfinite()].abs().max().clamp(min=1).item()
            torch.testing.assert_close(value.double(), exact_value, rtol=rtol, atol=atol * scale)
            for g, exact in zip(grads, exact_grads, strict=True):
                scale = exact[exact.isfinite()].abs().max().clamp(min=1).item()
                torch.testing.assert_close(g.double(), exact, rtol=rtol, atol=atol * scale)

    def test_opcheck(self):
        for operator, args in self.op.raw():
            here = tree_map_only(Tensor, lambda x: x.detach().to(self.op.device).requires_grad_(x.requires_grad), args)
            torch.library.opcheck(operator, here)

    def test_compile_fullgraph(self, variant):
        torch._dynamo.reset()
        tensors, kwargs = self.op.make(self.op.small, torch.float32, variant)
        compiled = torch.compile(lambda *t: self.op.call(*t, **kwargs), fullgraph=True)
        got = gradients(lambda *t: compiled(*t), tensors, {})
        want = gradients(self.op.call, tensors, kwargs)
        for a, b in zip(leaves(got), leaves(want), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # fp32 sums in another order

    def test_random_shapes(self):
        by_eager = 0

        def check(case):
            nonlocal by_eager
            by_eager += not check_case(self.op, case)

        ran = on_random_cases(check, random_cases(self.op))
        print(f"{self.op.name}: {ran} random cases on {self.op.device}, {by_eager} of them held to PyTorch's error")
