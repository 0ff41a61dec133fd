"""GPU kernels where there is no GPU: every variant compiles for every architecture, and keeps its registers.

A kernel that spills registers to memory is right and slow, and nothing else in this suite would see it.
"""

import pytest
from torch.torch_version import TorchVersion

from tests import compile_only
from tests.compile_only import ARCHITECTURES, SOURCES, TRITON

try:
    import triton
except ImportError:
    triton = None


def _compiled(compiler, what, architecture, folder) -> list[compile_only.Kernel]:
    try:
        kernels = compiler(what, architecture, folder)
    except compile_only.UnavailableError as reason:
        pytest.skip(str(reason))
    assert kernels, "no kernel was compiled"
    return kernels


# All three take ten minutes of a core: the others with -m slow, and in benchmarks/ptxas.py, which records them.
EACH = [a if a == 90 else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES]


@pytest.mark.parametrize("architecture", EACH)
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_cuda(source, architecture, tmp_path):
    kernels = _compiled(compile_only.cuda, source, architecture, tmp_path)
    assert [k for k in kernels if k.stack or k.spills] == []


# Bytes that a thread puts away before a sweep and takes back after it, once a row and never within a loop: what Triton
# 3.8 does on sm_90 (seen in `cuobjdump -sass`), and 3.7 does not.
PUT_AWAY = {("kd_kl_hvp", 90): 16} if TorchVersion(getattr(triton, "__version__", "0")) >= "3.8" else {}


@pytest.mark.parametrize("architecture", EACH)
@pytest.mark.parametrize("op", list(TRITON))
def test_triton(op, architecture, tmp_path):
    """The launchers themselves choose what is compiled, for every case the kernels are tested on."""
    kernels = _compiled(compile_only.triton, op, architecture, tmp_path)
    assert [k for k in kernels if k.stack > PUT_AWAY.get((op, architecture), 0) or k.spills] == []
