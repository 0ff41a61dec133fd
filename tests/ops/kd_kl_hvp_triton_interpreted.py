"""Triton's kd_kl_hvp under its interpreter. Collected only by test_kd_kl_hvp_triton.py, in a process of its own, as
TRITON_INTERPRET has to be set before the kernels are imported."""

import pytest

from kdfast.triton.kd_kl_hvp import kd_kl_hvp
from tests.ops.kd_kl_hvp_cases import CASES, EDGES, check

# numpy, which plays the GPU, warns of the infinities that masked classes and absent columns are made of.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case):
    check(case, kd_kl_hvp, truncates=True)  # the interpreter does, compiled code does not


@pytest.mark.parametrize("edge", EDGES, ids=lambda f: f.__name__)
def test_edge(edge):
    edge(kd_kl_hvp)
