"""perturb and virtual_step on an NVIDIA GPU: the CPU's cases there, and what only a GPU has."""

import pytest
import torch

from kdfast._native import has_kernel
from kdfast.ops.perturb import perturb
from kdfast.ops.virtual_step import virtual_step
from tests.laws import DTYPES
from tests.ops import test_perturb as displaced
from tests.ops import test_virtual_step as stepped
from tests.ops.test_perturb import SHAPES
from tests.ops.test_virtual_step import RULES

pytestmark = pytest.mark.cuda
# a piece of the kernels and one element more, and several pieces
WIDE = [*SHAPES, (32768,), (32769,), (5, 32768), (3, 70001)]


def make(shapes, dtype, seed=0):
    """(theta, g, v, factors), the tensors on the GPU."""
    *lists, factors = displaced.make(shapes, dtype, seed)
    return *([x.cuda() for x in tensors] for tensors in lists), factors


def on_cpu(perturbed):
    ahead, behind = ([x.cpu() for x in points] for points in perturbed[:2])
    return type(perturbed)(ahead, behind, perturbed.epsilon.cpu(), perturbed.slope.cpu())


@pytest.fixture(autouse=True)
def compiled():
    if not has_kernel("perturb", "CUDA"):
        pytest.skip("the compiled CUDA kernels are not built")


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_perturb(dtype, both):
    arguments = (*make(WIDE, dtype), 0.3, both)
    want = displaced.truth(*displaced.make(WIDE, dtype), 0.3, both)
    displaced.assert_close(on_cpu(perturb(*arguments)), want, dtype)


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step(dtype, rule, buffered):
    theta, g, buffers, _ = make(WIDE, dtype)
    got = virtual_step(theta, g, buffers if buffered else [], *RULES[rule])
    cpu = [[x.cpu() for x in tensors] for tensors in (theta, g, buffers if buffered else [])]
    want = stepped.optimizer_step(*cpu, *RULES[rule])
    stepped.assert_close([x.cpu() for x in got], want, dtype)


def test_more_tensors_than_a_table_holds():
    shapes = [(7,), (5, 3), (0,)] * 400  # 800 with elements, of 480 a launch
    arguments = (*make(shapes, torch.float32)[:3], [0.1] * len(shapes), 0.3, True)
    cpu = [[x.cpu() for x in tensors] for tensors in arguments[:3]]
    displaced.assert_close(on_cpu(perturb(*arguments)), displaced.truth(*cpu, *arguments[3:]), torch.float32)
    got = virtual_step(*arguments[:3], *RULES["nesterov"])
    want = stepped.optimizer_step(*cpu, *RULES["nesterov"])
    stepped.assert_close([x.cpu() for x in got], want, torch.float32)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_nothing_to_go_along(value):
    theta, g, v, factors = make([(40, 1000), (7,), ()], torch.float32)
    if value == 0:
        v = [torch.zeros_like(x) for x in v]
    v[0][3, 3] = value
    got = perturb(theta, g, v, factors, 0.1, True)
    assert got.epsilon == 0
    for x, y, t in zip(got.ahead, got.behind, theta, strict=True):
        torch.testing.assert_close(x, t, rtol=0, atol=0)
        torch.testing.assert_close(y, t, rtol=0, atol=0)


def test_only_empty_tensors():
    empty = [torch.zeros(0, device="cuda"), torch.zeros(3, 0, device="cuda")]
    got = perturb(empty, empty, empty, [1.0, 1.0], 0.1, False)
    assert got.epsilon == 0 and got.slope == 0
    assert [x.shape for x in virtual_step(empty, empty, [], *RULES["plain"])] == [(0,), (3, 0)]


def test_views_may_start_anywhere():
    lists = make([(6, 9), (40,), (4, 1025)], torch.bfloat16)
    moved = [[torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in tensors] for tensors in lists[:3]]
    for x, y in zip(perturb(*moved, lists[3], 0.1, True).ahead, perturb(*lists, 0.1, True).ahead, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-6)
    for x, y in zip(
        virtual_step(*moved, *RULES["nesterov"]), virtual_step(*lists[:3], *RULES["nesterov"]), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_twice_the_same_graphs_and_no_waiting():
    lists = make(WIDE, torch.float32)

    def call():
        moved = perturb(*lists, 0.1, True)
        return [*moved.ahead, *moved.behind, *moved[2:], *virtual_step(*lists[:3], *RULES["nesterov"])]

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
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_launches():
    """Two for a network's displacement, one for its step."""
    lists = make([(64, 64, 3, 3), (64,), (64,)] * 50, torch.float32)
    for run, most in (
        (lambda: perturb(*lists, 0.1, True), 2),
        (lambda: virtual_step(*lists[:3], *RULES["nesterov"]), 1),
    ):
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
        assert sum(e.count for e in profile.key_averages() if e.device_type.name == "CUDA") == most
