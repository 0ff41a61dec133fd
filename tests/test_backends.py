"""`show_backends`: what runs on each device, and why another does not."""

import re
import subprocess
import sys

import pytest
import torch

import kdfast
from kdfast import _native, backends


def test_every_op_has_a_line():
    lines = kdfast.show_backends().splitlines()
    assert lines[0].split() == ["op", "cpu", "cuda"]
    schemas = {
        s.name.removeprefix("kdfast::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("kdfast::")
    }
    assert {line.split()[0] for line in lines[1 : lines.index("")]} == schemas


def test_it_says_what_the_dispatcher_does(monkeypatch):
    native = _native.has_kernel("kd_kl", "CPU")
    assert ("C++ (" in kdfast.show_backends()) == native
    monkeypatch.setattr(_native, "failure", "no compiler today")
    assert "C++: not built: no compiler today" in kdfast.show_backends()


def test_why_there_is_no_gpu_kernel(monkeypatch):
    monkeypatch.setitem(_native.build_info, "cuda_architectures", "")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert f"CUDA C++: not built: torch {torch.__version__} is a build without CUDA" in kdfast.show_backends()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "no nvcc, or KDFAST_CUDA=OFF, when kdfast was installed; install the CUDA toolkit" in kdfast.show_backends()
    assert backends.OPS


def test_nodes_built_for_another_torch_are_said(monkeypatch):
    monkeypatch.setattr(_native, "failure", None)
    monkeypatch.setattr(_native, "autograd", None)
    monkeypatch.setitem(_native.build_info, "torch", "2.11.0")
    assert f"not used: built for torch 2.11.0, this is torch {torch.__version__}" in kdfast.show_backends()


def test_gpu_kernels_of_triton_without_compiled_ones():
    """A torch for CUDA beside an install without a compiler: the ops are there before Triton is registered for them."""
    pytest.importorskip("triton")
    code = (
        "import sys, torch; torch.version.cuda = '13.0'; sys.modules['kdfast._C'] = None;"
        "import kdfast; print(kdfast.show_backends())"
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"^kd_kl_topk +reference \(PyTorch\) +Triton$", ran.stdout, re.MULTILINE)
