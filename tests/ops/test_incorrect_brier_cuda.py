"""incorrect_brier on an NVIDIA GPU: the law suite's values there, the compiled CUDA kernels and Triton's, and what only
a GPU has."""

import pytest
import torch

import kdfast.triton
from kdfast import incorrect_brier
from kdfast._native import has_kernel
from kdfast.reference.incorrect_brier import incorrect_brier as reference
from kdfast.reference.incorrect_brier import incorrect_brier_gradient
from tests.ops.test_incorrect_brier import VARIANTS, inputs

pytestmark = pytest.mark.cuda
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cuda", "triton"])
def kernels(request):
    """(forward, backward), with the same arguments as the ops."""
    if request.param == "cuda":
        if not has_kernel("incorrect_brier", "CUDA") or "incorrect_brier" in kdfast.triton.registered:
            pytest.skip("the compiled CUDA kernels are not built")
        return torch.ops.kdfast.incorrect_brier, torch.ops.kdfast.incorrect_brier_backward
    if not kdfast.triton.installed():
        pytest.skip("triton is not installed")
    from kdfast.triton import incorrect_brier as module

    return module.incorrect_brier, module.incorrect_brier_backward


def make(rows, classes, dtype, labels, seed=0):
    """(logits, labels, target) on the GPU; the first rows tied, masked, NaN, or labelled out of range."""
    (logits,), kwargs = inputs(torch.Generator().manual_seed(seed), (rows, classes), dtype, {"labels": labels})
    logits[:1] = 0
    if rows > 3 and classes > 5:
        logits[1, 2:] = -torch.inf
        logits[2, classes // 2], logits[3] = torch.nan, -torch.inf
    given = kwargs["labels"]
    soft = given.is_floating_point()
    return tuple(x if x is None else x.cuda() for x in (logits, None if soft else given, given if soft else None))


@pytest.mark.parametrize(
    "shape", [(6, 10), (130, 7), (7, 100), (6, 1000), (5, 4096), (4, 9001), (2, 70001), (3, 1), (0, 5)]
)
@pytest.mark.parametrize("labels", ["index", "ignored", "soft"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype, labels, shape, kernels):
    tensors = make(*shape, dtype, labels)
    loss, stats = kernels[0](*tensors, -100)
    grad = torch.linspace(-1, 2, shape[0], dtype=loss.dtype, device="cuda")
    ours = kernels[1](grad, *tensors, stats, -100)
    exact = [x if x is None or not x.is_floating_point() else x.double() for x in tensors]
    want = reference(*exact, -100)
    want_gradient = grad.double().unsqueeze(-1) * incorrect_brier_gradient(*exact, -100)
    # exponentials to 2^-22, and what is stored in the logits' type
    rtol = 1e-11 if dtype == torch.float64 else 5e-6
    torch.testing.assert_close(loss.double(), want, rtol=rtol, atol=rtol, equal_nan=True)
    stored = 0 if dtype == torch.float64 else torch.finfo(dtype).eps
    torch.testing.assert_close(
        ours.double(), want_gradient, rtol=rtol + stored, atol=rtol + stored * 2**-10, equal_nan=True
    )
    right = want == 0
    assert ours[right].eq(0).all()


def test_views_may_start_anywhere(kernels):
    for dtype in DTYPES:
        for classes in (12, 2056):
            tensors = make(6, classes, dtype, "index")
            moved = torch.cat([tensors[0].new_zeros(1), tensors[0].flatten()])[1:].view_as(tensors[0])
            (loss, _), (want, want_stats) = kernels[0](moved, *tensors[1:], -100), kernels[0](*tensors, -100)
            torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6, equal_nan=True)
            got = kernels[1](torch.ones_like(loss), moved, *tensors[1:], want_stats, -100)
            same = kernels[1](torch.ones_like(loss), *tensors, want_stats, -100)
            torch.testing.assert_close(got, same, rtol=0, atol=0, equal_nan=True)


def test_twice_the_same_graphs_and_no_waiting(kernels):
    tensors = make(64, 1000, torch.float32, "index")
    grad = torch.ones(64, device="cuda")

    def call():
        loss, stats = kernels[0](*tensors, -100)
        return loss, kernels[1](grad, *tensors, stats, -100)

    want = call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    for got in (again, captured):
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_public_function(variant):
    """On a GPU it agrees with itself on the CPU."""
    got = []
    for device in ("cpu", "cuda"):
        (logits,), kwargs = inputs(torch.Generator().manual_seed(1), (32, 100), torch.float32, VARIANTS[variant])
        logits = logits.to(device).requires_grad_()
        loss = incorrect_brier(logits, **{k: v.to(device) if k == "labels" else v for k, v in kwargs.items()})
        loss.sum().backward()
        got.append([loss.detach().cpu(), logits.grad.cpu()])
    for x, y in zip(*got, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
