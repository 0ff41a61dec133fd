"""What every op must keep to on a GPU, over all the law suite's descriptions: it never makes the device wait, and its
forward and backward can be captured in a CUDA graph. Where there is none, meta tensors show what would be copied there
from the host, which a GPU waits for."""

import importlib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kdfast import pathway_distances, pathway_loss
from tests.laws import LawfulOp, Laws, leaves

OP_TESTS = Path(__file__).resolve().parent / "ops"
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def described() -> dict[str, LawfulOp]:
    """The op of every law class in tests/ops/test_*.py."""
    found = {}
    for path in sorted(OP_TESTS.glob("test_*.py")):
        for value in vars(importlib.import_module(f"tests.ops.{path.stem}")).values():
            if isinstance(value, type) and issubclass(value, Laws) and hasattr(value, "op"):
                found[value.op.name] = value.op
    return found


OPS = described()
CALLS = [
    pytest.param(op, variant, shape, dtype, id=f"{name}-{which}-{regime}-{str(dtype).removeprefix('torch.')}")
    for name, op in OPS.items()
    for which, variant in op.variants.items()
    for regime, shape in op.shapes.items()
    for dtype in DTYPES
]


VARIANTS = [pytest.param(op, v, id=f"{name}-{which}") for name, op in OPS.items() for which, v in op.variants.items()]


def test_every_law_class_is_here():
    """An op that this file overlooks would pass unseen: its rules run only where there is a GPU."""
    classes = sum(path.read_text().count("(Laws):") for path in OP_TESTS.glob("test_*.py"))
    assert len(OPS) >= classes > 0
    assert len(CALLS) >= len(OPS)


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(LawfulOp, "device", "cuda")


@contextmanager
def waiting_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def forward_backward(op, tensors, kwargs, cotangent):
    """[value, *gradients], all on the device, of all the tensors and of the first alone."""
    first = tensors[0].detach().requires_grad_()
    out = []
    for used, given in ((tensors, tensors), ((first,), (first, *(t.detach() for t in tensors[1:])))):
        value = op.call(*given, **kwargs)
        grads = torch.autograd.grad(value, used, cotangent, allow_unused=True)
        out += [value.detach(), *(g for g in grads if g is not None)]
    return out


def prepared(op, variant, shape, dtype):
    """Inputs and a cotangent on the device; what is compiled or found out on first use is so now."""
    tensors, kwargs = op.make(shape, dtype, variant)
    value = op.call(*tensors, **kwargs)
    cotangent = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(value)
    forward_backward(op, tensors, kwargs, cotangent)
    return tensors, kwargs, cotangent


@pytest.mark.cuda
@pytest.mark.parametrize(("op", "variant", "shape", "dtype"), CALLS)
def test_never_waits_for_the_device(op, variant, shape, dtype, on_a_gpu):
    tensors, kwargs, cotangent = prepared(op, variant, shape, dtype)
    with waiting_is_an_error():
        out = forward_backward(op, tensors, kwargs, cotangent)
    assert all(x.is_cuda for x in out)


@pytest.mark.cuda
@pytest.mark.parametrize(("op", "variant"), VARIANTS)
def test_second_order_never_waits_for_the_device(op, variant, on_a_gpu):
    tensors, kwargs, cotangent = prepared(op, variant, op.small, torch.float32)
    second_order(op, tensors, kwargs, cotangent)
    with waiting_is_an_error():
        second = second_order(op, tensors, kwargs, cotangent)
    assert any(x is not None and x.is_cuda for x in second)


def second_order(op, tensors, kwargs, cotangent):
    value = op.call(*tensors, **kwargs)
    grads = torch.autograd.grad(value, tensors, cotangent, create_graph=True, allow_unused=True)
    total = sum(g.sum() for g in grads if g is not None and g.requires_grad)
    return torch.autograd.grad(total, tensors, allow_unused=True)


class ByList(TorchFunctionMode):
    """A list as an index is copied to the device. Only seen in the forward: autograd leaves such modes behind."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function is not Tensor.__getitem__ or args[0].is_cpu or not isinstance(args[1], list), f"x[{args[1]}]"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def copies_to_meta_are_an_error(monkeypatch):
    def watched(function):
        def call(*args, **kwargs):
            out = function(*args, **kwargs)
            copied = isinstance(out, Tensor) and out.is_meta and not (isinstance(args[0], Tensor) and args[0].is_meta)
            assert not copied, f"{function.__name__} copies from the host to the device"
            return out

        return call

    for place, name in ((torch, "tensor"), (torch, "as_tensor"), (torch, "asarray"), (Tensor, "to")):
        monkeypatch.setattr(place, name, watched(getattr(place, name)))


@pytest.mark.parametrize(("op", "variant"), VARIANTS)
def test_second_order_copies_nothing_from_the_host(op, variant, monkeypatch, request):
    monkeypatch.setattr(LawfulOp, "device", "meta")
    made = [op.make(shape, torch.float32, variant) for shape in (op.small, *op.shapes.values())]
    request.getfixturevalue("copies_to_meta_are_an_error")
    for tensors, kwargs in made:
        with ByList():
            value = op.call(*tensors, **kwargs)
        assert value.is_meta
        second_order(op, tensors, kwargs, torch.ones_like(value))


@pytest.mark.cuda
@pytest.mark.parametrize(("op", "variant", "shape", "dtype"), CALLS)
def test_cuda_graph(op, variant, shape, dtype, on_a_gpu):
    """Captured on some inputs and replayed on others: what a call on those gives, bit for bit."""
    tensors, kwargs, cotangent = prepared(op, variant, shape, dtype)
    fresh_tensors, fresh_kwargs = op.make(shape, dtype, variant, seed=1)
    want = forward_backward(op, fresh_tensors, fresh_kwargs, cotangent)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # autograd's own set-up may not fall into the capture
        for _ in range(3):
            forward_backward(op, tensors, kwargs, cotangent)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_backward(op, tensors, kwargs, cotangent)
    with torch.no_grad():
        for static, new in zip(leaves((tensors, kwargs)), leaves((fresh_tensors, fresh_kwargs)), strict=True):
            if isinstance(static, Tensor):
                static.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(captured, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_weights_and_keep_as_lists_copy_nothing_from_the_host(copies_to_meta_are_an_error):
    maps = [torch.empty(2, 3, 8, 8, device="meta") for _ in range(3)]
    for keep in (None, [2, 0], [True, False, True]):
        with ByList():
            assert pathway_loss(maps, maps, [0.5, 1.0, 2.0], keep=keep).is_meta
            assert pathway_distances(maps, maps, keep=keep).shape == (3,)
