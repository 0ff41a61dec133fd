"""kd_kl_hvp on an NVIDIA GPU: the compiled CUDA kernel and Triton's, on the same cases as on a CPU."""

import pytest
import torch

import kdfast.triton
from kdfast._native import has_kernel
from tests.ops.kd_kl_cases import make
from tests.ops.kd_kl_hvp_cases import CASES, DIRECTIONS, EDGES, check, direction

pytestmark = pytest.mark.cuda


@pytest.fixture(params=["cuda", "triton"])
def kernel(request):
    if request.param == "cuda":
        if not has_kernel("kd_kl_hvp", "CUDA") or "kd_kl_hvp" in kdfast.triton.registered:
            pytest.skip("the compiled CUDA kernels are not built")
        return torch.ops.kdfast.kd_kl_hvp
    if not kdfast.triton.installed():
        pytest.skip("triton is not installed")
    from kdfast.triton.kd_kl_hvp import kd_kl_hvp

    return kd_kl_hvp


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, kernel):
    check(case, kernel, device="cuda")


@pytest.mark.parametrize("edge", EDGES, ids=lambda f: f.__name__)
def test_edge(edge, kernel):
    edge(kernel, device="cuda")


def test_twice_is_the_same_and_never_waits(kernel):
    case = next(c for c in CASES if c.regime == "1000")
    tensors = make(case, "cuda")
    args = (*tensors, *direction(tensors, DIRECTIONS["all"]), *case.options, True, True)
    first = kernel(*args)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = kernel(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
