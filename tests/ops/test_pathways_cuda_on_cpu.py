"""The CUDA kernels of pathways, run thread by thread on a CPU: the values they compute, planner included. What a GPU
alone can show (streams, graphs, speed) is test_pathways_cuda.py's part."""

import pytest
import torch

import kdfast  # noqa: F401  (defines the ops, whose schemas are built for a CPU once more)
from kdfast.reference.pathways import ATTENTION, BILINEAR, HCL, MSE
from tests.ops.cuda_on_cpu import LIBRARY, build
from tests.ops.pathways_cases import CASES, EDGES, Case, Kernels, Pair, check, make

# Beyond what registers hold, beyond what shared memory does, and several blocks a pair; too slow for other kernels'
# tests on a CPU.
LARGE = (
    Pair(1, 1, 70, 61),
    Pair(1, 1, 140, 132),
    Pair(2, 8, 34, 34, layout="ll"),
    Pair(3, 5, 20, 28),
    Pair(1, 3, 49, 49),
)
CASES = [
    *CASES,
    *(Case("large", LARGE, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)),
    Case("large", LARGE[2:], MSE),
    Case("large", (Pair(1, 1, 160, 150, (70, 71)), Pair(1, 1, 40, 50, (110, 120))), HCL, BILINEAR),
    Case("large", (Pair(2, 2, 100, 97), Pair(1, 9, 8, 8)), ATTENTION),
]


NAMES = ("pathways", "pathways_backward", "pathways_value_and_grad")
RACES = [c for c in CASES if c.regime in ("stages", "channels_last", "channels", "bilinear")][::3]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    schemas = [str(getattr(torch.ops.kdfast, name).default._schema).removeprefix("kdfast::") for name in NAMES]
    library = build("pathways", schemas, tmp_path_factory.mktemp("cuda_on_cpu"))
    yield Kernels(*(getattr(getattr(torch.ops, LIBRARY), name) for name in NAMES))
    del library


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, kernels):
    check(case, kernels)


@pytest.mark.parametrize("edge", EDGES, ids=lambda f: f.__name__)
def test_edge(edge, kernels):
    edge(kernels)


@pytest.mark.parametrize("case", RACES, ids=str)
def test_any_order_of_threads_gives_the_same(case, kernels, monkeypatch):
    """Bit for bit: threads that read what others write are kept apart by barriers."""
    students, teachers, keep, grad = make(case)
    results = []
    for order in ("0", "1", "7"):
        monkeypatch.setenv("KDFAST_ORDER", order)
        distances, gradients = kernels.value_and_grad(students, teachers, grad, keep, case.distance, case.resize)
        results.append([distances, *gradients])
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
