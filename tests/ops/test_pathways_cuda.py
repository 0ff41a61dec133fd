"""pathways on an NVIDIA GPU: the compiled CUDA kernels and Triton's, on the same cases as on a CPU, and on what only a
GPU has: streams, graphs, several devices."""

import pytest
import torch

import kdfast
import kdfast.triton
from kdfast._native import has_kernel
from kdfast.reference.pathways import ATTENTION, BILINEAR, HCL, L1, MSE
from tests.ops.pathways_cases import (
    CASES,
    EDGES,
    OTHER_CHANNELS,
    RESIZED,
    STAGES,
    Case,
    Kernels,
    Pair,
    check,
    make,
    truth,
)
from tests.ops.test_pathways_cuda_on_cpu import CASES as ON_CPU

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
NAMES = ("pathways", "pathways_backward", "pathways_value_and_grad")
LARGE = [case for case in ON_CPU if case.regime == "large"]
# One launch of everything the kernels do: planes in registers, in shared memory, resized, dropped.
MIXED = Case("mixed", (*STAGES, *RESIZED, Pair(16, 32, 14, 14), Pair(4, 64, 56, 56)), HCL, BILINEAR, dropped=(1, 5))
ENERGY = Case("energy", (*STAGES, *OTHER_CHANNELS), ATTENTION, dropped=(1, 5))


@pytest.fixture(params=["cuda", "triton"])
def kernels(request):
    """With the same arguments as the ops."""
    if request.param == "cuda":
        if not has_kernel("pathways", "CUDA") or "pathways" in kdfast.triton.registered:
            pytest.skip("the compiled CUDA kernels are not built")
        return Kernels(*(getattr(torch.ops.kdfast, name) for name in NAMES))
    if not kdfast.triton.installed():
        pytest.skip("triton is not installed")
    from kdfast.triton import pathways

    return Kernels(*(getattr(pathways, name) for name in NAMES))


def call(kernels: Kernels, case: Case, made: tuple) -> list[torch.Tensor]:
    """Distances and all gradients, by all three kernels."""
    students, teachers, keep, grad = made
    options = keep, case.distance, case.resize
    by_student, by_teacher = kernels.backward(grad, students, teachers, *options, True, True)
    again, by_student_too = kernels.value_and_grad(students, teachers, grad, *options)
    return [kernels.forward(students, teachers, *options), *by_student, *by_teacher, again, *by_student_too]


def same(ours, want) -> None:
    for x, y in zip(ours, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("case", [*CASES, *LARGE, MIXED, ENERGY], ids=str)
def test_case(case, kernels):
    check(case, kernels, device=DEVICE)


@pytest.mark.parametrize("edge", EDGES, ids=lambda f: f.__name__)
def test_edge(edge, kernels):
    edge(kernels, device=DEVICE)


@pytest.mark.parametrize("case", [MIXED, ENERGY], ids=str)
def test_twice_is_the_same_bit_for_bit(case, kernels):
    made = make(case, DEVICE)
    same(call(kernels, case, made), call(kernels, case, made))


@pytest.mark.parametrize("case", [MIXED, ENERGY], ids=str)
def test_never_waits_for_the_device(case, kernels):
    made = make(case, DEVICE)
    call(kernels, case, made)  # what is compiled on first use is compiled now
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(kernels, case, made)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", [MIXED, ENERGY], ids=str)
def test_cuda_graph(case, kernels):
    """Captured once; then other maps, other weights and other pathways kept."""
    made = make(case, DEVICE)
    students, teachers, keep, grad = made
    fresh = ([x.nan_to_num(0.5).flip(0) for x in students], [x.nan_to_num(0.25) for x in teachers], ~keep, grad.flip(0))
    want = call(kernels, case, fresh)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(kernels, case, made)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(kernels, case, made)
    for static, new in zip((*students, *teachers, keep, grad), (*fresh[0], *fresh[1], *fresh[2:]), strict=True):
        static.copy_(new)
    graph.replay()
    same(captured, want)


@pytest.mark.parametrize("case", [MIXED, ENERGY], ids=str)
def test_runs_on_the_current_stream(case, kernels):
    """Inputs that a busy side stream has yet to write: on any other stream the kernels would read zeros."""
    students, teachers, keep, grad = make(case, DEVICE)
    want = call(kernels, case, (students, teachers, keep, grad))
    late = [[torch.zeros_like(x) for x in maps] for maps in (students, teachers)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        for x, source in zip((*late[0], *late[1]), (*students, *teachers), strict=True):
            x.copy_(source)
        ours = call(kernels, case, (*late, keep, grad))
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


@pytest.mark.parametrize("distance", [MSE, L1, HCL, ATTENTION])
def test_many_blocks(distance, kernels):
    """Maps of a training step: thousands of blocks, whose sums keep their digits."""
    case = Case("step", (Pair(128, 32, 32, 32), Pair(128, 64, 16, 16), Pair(128, 128, 8, 8)), distance)
    made = make(case, DEVICE)
    want = truth(case, *made)
    distances, gradients = kernels.value_and_grad(*made[:2], made[3], None, distance, case.resize)
    torch.testing.assert_close(
        distances.double().cpu(), want[0], rtol=2e-6, atol=0
    )  # sums of up to 4e6 terms, in trees
    for g, t in zip(gradients, want[1], strict=True):
        torch.testing.assert_close(g.double().cpu(), t, rtol=1e-5, atol=1e-5 * t.abs().max().item())


@pytest.mark.parametrize("distance", ["mse", "l1", "hcl", "attention"])
def test_pathway_loss(distance):
    """The public function on a GPU agrees with itself on the CPU, the weights' gradient and `keep` included."""
    got = []
    for device in ("cpu", DEVICE):
        students, teachers, _, _ = make(Case("public", STAGES), device)
        leaves = [*(x.requires_grad_() for x in students), torch.rand(4, generator=torch.Generator().manual_seed(0))]
        leaves[-1] = leaves[-1].to(device).requires_grad_()
        keep = torch.tensor([True, False, True, True]).to(device)
        loss = kdfast.pathway_loss(students, teachers, leaves[-1], distance=distance, keep=keep)
        loss.backward()
        got.append([loss.detach().cpu(), *(x.grad.cpu() for x in leaves)])
    for x, y in zip(*got, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
