"""What every op must keep to on a GPU, over all the law suite's descriptions: it never makes the device wait, and its
forward and backward can be captured in a CUDA graph."""

import importlib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

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
@pytest.mark.parametrize(("op", "variant"), [p for op in OPS.values() for p in ((op, v) for v in op.variants.values())])
def test_second_order_never_waits_for_the_device(op, variant, on_a_gpu):
    tensors, kwargs, cotangent = prepared(op, variant, op.small, torch.float32)

    def product():
        value = op.call(*tensors, **kwargs)
        grads = torch.autograd.grad(value, tensors, cotangent, create_graph=True, allow_unused=True)
        total = sum(g.sum() for g in grads if g is not None and g.requires_grad)
        return torch.autograd.grad(total, tensors, allow_unused=True)

    product()
    with waiting_is_an_error():
        second = product()
    assert any(x is not None and x.is_cuda for x in second)


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
