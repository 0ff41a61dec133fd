"""Triton's pathways under its interpreter. Collected only by test_pathways_triton.py, in a process of its own, as
TRITON_INTERPRET has to be set before the kernels are imported."""

import pytest

from kdfast.triton.pathways import pathways, pathways_backward, pathways_value_and_grad
from tests.ops.pathways_cases import CASES, EDGES, Kernels, check

KERNELS = Kernels(pathways, pathways_backward, pathways_value_and_grad)
# numpy, which plays the GPU, warns of the NaN that tests put in.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case):
    check(case, KERNELS, truncates=True)  # the interpreter does, compiled code does not


@pytest.mark.parametrize("edge", EDGES, ids=lambda f: f.__name__)
def test_edge(edge):
    edge(KERNELS)
