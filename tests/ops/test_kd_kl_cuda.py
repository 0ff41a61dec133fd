"""kd_kl on an NVIDIA GPU: the compiled CUDA kernels and Triton's, on the same cases as on a CPU, and on what
only a GPU has: streams, graphs, several devices, and tensors of more than 2^31 elements."""

import pytest
import torch

import kdfast
import kdfast.triton
from kdfast._native import has_kernel
from kdfast.reference.kd_kl import Options, accumulate_dtype
from tests.ops.kd_kl_cases import CASES, EDGES, Case, check, make, run
from tests.ops.kd_kl_cuda_cases import OTHER_EDGES, OTHERS, SPLIT, check_others, check_value_and_grad

pytestmark = pytest.mark.cuda
DEVICE = "cuda"


@pytest.fixture(params=["cuda", "triton"])
def kernels(request):
    """(forward, backward), with the same arguments as the ops."""
    if request.param == "cuda":
        if not has_kernel("kd_kl", "CUDA") or "kd_kl" in kdfast.triton.registered:
            pytest.skip("the compiled CUDA kernels are not built")
        return torch.ops.kdfast.kd_kl, torch.ops.kdfast.kd_kl_backward
    if not kdfast.triton.installed():
        pytest.skip("triton is not installed")
    from kdfast.triton.kd_kl import kd_kl, kd_kl_backward

    return kd_kl, kd_kl_backward


MIXED = Case("mixed", 64, 1000, Options(4.0, 2.0, 0.5, 0.1), hard="ignored", temperatures="rows", weight=True)
WIDE = Case("wide", 8, 40001, Options(2.0, 2.0, 0.5), torch.bfloat16, "labels", temperatures="one")
JSD = Case("jsd", 64, 5001, Options(2.0, 2.0, 0.3, divergence=3, softcap=20.0), hard="labels", temperatures="rows")
DKD = Case("dkd", 2, 70001, Options(2.0, 2.0, divergence=4, beta=8.0), hard="ignored", temperatures="one")
SEVERAL = [MIXED, WIDE, JSD, DKD]


def call(kernels, case: Case, tensors: tuple) -> list:
    """[loss, ds, dt, dtau_s, dtau_t] under a gradient of ones, which is made without a copy from the host."""
    grad = torch.ones(case.rows, dtype=tensors[2].dtype, device=tensors[0].device)
    return run(*kernels, tensors, case.options, grad)[0]


def same(ours, want) -> None:
    for x, y in zip(ours, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, kernels):
    check(case, *kernels, device=DEVICE)


@pytest.mark.parametrize("case", OTHERS + SPLIT, ids=str)
def test_other_case(case, kernels):
    check_others(case, *kernels, device=DEVICE)


def test_few_huge_rows(kernels):
    """Many blocks a row; four, so that most of a GPU would stand idle with one."""
    options = Options(2.0, 2.0, 0.3, 0.1)
    check_others(Case("huge", 4, 1 << 20, options, hard="labels", temperatures="rows"), *kernels, device=DEVICE)


@pytest.mark.parametrize("edge", EDGES + OTHER_EDGES, ids=lambda f: f.__name__)
def test_edge(edge, kernels):
    edge(*kernels, device=DEVICE)


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_twice_is_the_same_bit_for_bit(case, kernels):
    tensors = make(case, DEVICE)
    same(call(kernels, case, tensors), call(kernels, case, tensors))


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_never_waits_for_the_device(case, kernels):
    tensors = make(case, DEVICE)
    call(kernels, case, tensors)  # what is compiled on first use is compiled now
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(kernels, case, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_cuda_graph(case, kernels):
    tensors = make(case, DEVICE)
    fresh = (tensors[0].flip(0).contiguous(), tensors[1].flip(1).contiguous(), *tensors[2:])
    want = call(kernels, case, fresh)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(kernels, case, tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(kernels, case, tensors)
    for static, new in zip(tensors[:2], fresh[:2], strict=True):
        static.copy_(new)
    graph.replay()
    same(captured, want)


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_runs_on_the_current_stream(case, kernels):
    """Inputs that a busy side stream has yet to write: on any other stream the kernels would read zeros."""
    tensors = make(case, DEVICE)
    want = call(kernels, case, tensors)
    late = [torch.zeros_like(x) for x in tensors[:2]]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        for x, source in zip(late, tensors[:2], strict=True):
            x.copy_(source)
        ours = call(kernels, case, (*late, *tensors[2:]))
    side.synchronize()
    same(ours, want)


def test_runs_on_its_tensors_device(kernels):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    want = call(kernels, MIXED, make(MIXED, "cuda:0"))
    with torch.cuda.device(0):
        ours = call(kernels, MIXED, make(MIXED, "cuda:1"))
        assert torch.cuda.current_device() == 0
    same([x.to("cuda:0") for x in ours], want)


def test_more_than_2_to_the_31_elements(kernels):
    """The last rows, whose offset needs 64 bits, come out as on their own."""
    rows, classes, last = 16800, 128256, 4
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GB of GPU memory")
    student = torch.empty(rows, classes, dtype=torch.bfloat16, device=DEVICE)
    teacher = torch.empty_like(student)
    for x in (student, teacher):
        x[-last:] = torch.randn(last, classes, device=DEVICE)
        x[:-last] = 0
    options, absent = Options(2.0, 2.0), (None,) * 5

    def both(s, t):
        loss, stats = kernels[0](s, t, *absent, *options, False)
        return loss, kernels[1](torch.ones_like(loss), s, t, *absent, stats, *options, True, False)[0]

    loss, ds = both(student, teacher)
    same((loss[-last:], ds[-last:]), both(student[-last:].clone(), teacher[-last:].clone()))
    assert loss[:-last].abs().max() < 1e-6  # equal distributions


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "none"])
def test_kd_loss(reduction):
    """The public function on a GPU agrees with itself on the CPU, gradients of both temperatures included."""
    got = []
    for device in ("cpu", DEVICE):
        student, teacher, tau_s, tau_t, labels, _, weight = make(MIXED, device)
        leaves = [x.requires_grad_() for x in (student, teacher, tau_s, tau_t)]
        loss = kdfast.kd_loss(
            student, teacher, labels, alpha=0.3, student_temperature=tau_s, teacher_temperature=tau_t,
            weight=weight, label_smoothing=0.1, reduction=reduction,
        )  # fmt: skip
        loss.sum().backward()
        got.append([loss.detach().cpu(), *(x.grad.cpu() for x in leaves)])
    for x, y in zip(*got, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- loss and gradient in one launch
@pytest.fixture
def value_and_grad():
    if not has_kernel("kd_kl_value_and_grad", "CUDA") or "kd_kl" in kdfast.triton.registered:
        pytest.skip("the compiled CUDA kernels are not built")
    return torch.ops.kdfast.kd_kl_value_and_grad


# By lanes, a block, a cluster of 2 to 16, and more than any holds.
ON_CHIP = [
    Case(f"{classes}", 33, classes, options, dtype, "labels", temperatures="rows", masked=True)
    for dtype in (torch.float32, torch.bfloat16)
    for classes, options in (
        (10, Options(2.0, 2.0, 0.3)),
        (1000, Options(2.0, 2.0, divergence=3)),
        (1001, Options(2.0, 2.0, 0.3, 0.1)),
        (5003, Options(2.0, 2.0, 0.3, divergence=4)),
        (16384, Options(2.0, 2.0, 0.3, softcap=30.0)),
        (32000, Options(2.0, 2.0, 0.3)),
        (50257, Options(2.0, 2.0, 0.3, divergence=3)),
        (128256, Options(2.0, 2.0, 0.3)),
        (262144, Options(2.0, 2.0, 0.3, 0.1)),
        (600011, Options(2.0, 2.0, 0.3)),
    )
]
SOME_ON_CHIP = [case for case in ON_CHIP if case.classes in (1001, 50257, 600011)]


def at_once(value_and_grad, case: Case, tensors: tuple) -> list:
    return list(value_and_grad(*tensors, *case.options, True, 0.5))


@pytest.mark.parametrize("case", [c for c in CASES + OTHERS if c.rows > 0] + ON_CHIP, ids=str)
def test_value_and_grad(case, value_and_grad):
    check_value_and_grad(case, value_and_grad, torch.ops.kdfast.kd_kl, device=DEVICE)


def test_value_and_grad_of_no_rows(value_and_grad):
    empty = torch.empty(0, 5, device=DEVICE)
    loss, stats, ds = value_and_grad(empty, empty, *(None,) * 5, *Options(), False, 1.0)
    assert loss.item() == 0
    assert (stats.shape, ds.shape) == ((0, 8), (0, 5))


@pytest.mark.parametrize("case", SOME_ON_CHIP, ids=str)
def test_value_and_grad_twice_without_waiting(case, value_and_grad):
    """The same bit for bit, and no wait for the device in the second call."""
    tensors = make(case, DEVICE)
    first = at_once(value_and_grad, case, tensors)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = at_once(value_and_grad, case, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same(again, first)


@pytest.mark.parametrize("case", SOME_ON_CHIP, ids=str)
def test_value_and_grad_in_a_graph(case, value_and_grad):
    tensors = make(case, DEVICE)
    fresh = [x.flip(0).contiguous() for x in tensors[:2]]
    want = at_once(value_and_grad, case, (*fresh, *tensors[2:]))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        at_once(value_and_grad, case, tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = at_once(value_and_grad, case, tensors)
    for static, new in zip(tensors[:2], fresh, strict=True):
        static.copy_(new)
    graph.replay()
    same(captured, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, -0.75])
def test_scale(dtype, factor, value_and_grad):
    for shape in ((3, 5), (33, 1001), (64, 40000)):
        x = torch.randn(shape, device=DEVICE).to(dtype)
        by = torch.tensor(factor, dtype=accumulate_dtype(dtype), device=DEVICE)
        want = (x.to(by.dtype) * by).to(dtype)
        torch.ops.kdfast.kd_kl_scale_(x, by)
        same([x], [want])
