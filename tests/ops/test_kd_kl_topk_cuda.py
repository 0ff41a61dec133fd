"""kd_kl_topk on an NVIDIA GPU: the compiled CUDA kernels and Triton's, on the same cases as on a CPU."""

import pytest
import torch

import kdfast.triton
from kdfast import topk_kd_loss, topk_teacher
from kdfast._native import has_kernel
from tests.ops.kd_kl_topk_cases import CASES, EDGES, check

pytestmark = pytest.mark.cuda


@pytest.fixture(params=["cuda", "triton"])
def kernels(request):
    """(forward, backward), with the same arguments as the ops."""
    if request.param == "cuda":
        if not has_kernel("kd_kl_topk", "CUDA") or "kd_kl_topk" in kdfast.triton.registered:
            pytest.skip("the compiled CUDA kernels are not built")
        return torch.ops.kdfast.kd_kl_topk, torch.ops.kdfast.kd_kl_topk_backward
    if not kdfast.triton.installed():
        pytest.skip("triton is not installed")
    from kdfast.triton.kd_kl_topk import kd_kl_topk, kd_kl_topk_backward

    return kd_kl_topk, kd_kl_topk_backward


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, kernels):
    check(case, *kernels, device="cuda")


@pytest.mark.parametrize("edge", EDGES, ids=lambda f: f.__name__)
def test_edge(edge, kernels):
    edge(*kernels, device="cuda")


def test_topk_kd_loss_never_waits_and_agrees_with_the_cpu():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(64, 1000, generator=generator) for _ in range(2))
    got = []
    for device in ("cpu", "cuda"):
        s, (log_probs, indices) = student.to(device).requires_grad_(), topk_teacher(teacher.to(device), 20)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = topk_kd_loss(s, log_probs, indices)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        got.append((loss.detach().cpu(), s.grad.cpu()))
    for x, y in zip(*got, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
