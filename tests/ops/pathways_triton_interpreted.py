"""Triton's pathways under its interpreter. Collected only by test_pathways_triton.py, in a process of its own, as
TRITON_INTERPRET has to be set before the kernels are imported."""

import pytest

from kdfast.reference.pathways import BILINEAR, HCL
from kdfast.triton.pathways import pathways, pathways_backward, pathways_value_and_grad
from tests.ops.pathways_cases import CASES, EDGES, Case, Kernels, Pair, check

KERNELS = Kernels(pathways, pathways_backward, pathways_value_and_grad)
# numpy, which plays the GPU, warns of the NaN that tests put in.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# The interpreter takes 10 ms a program: each regime once, the storage types dealt out among them.
CHOSEN = (
    "stages-hcl-bfloat16", "sides-hcl-float32", "channels_last-hcl-float32", "stages-mse-bfloat16", "stages-l1-float32",
    "nearest-hcl-float32", "bilinear-l1-float32", "bilinear-hcl-float64", "channels-attention-float16",
    "bilinear-attention-float32", "dropped-hcl-float32", "dropped-attention-float32", "unaligned-mse-float32",
    "one gradient-hcl-float32",
)  # fmt: skip
# Planes of more rows than a tile holds, and one that is made smaller.
TALL = Case("tall", (Pair(1, 1, 75, 70), Pair(1, 1, 9, 150, (40, 20)), Pair(1, 1, 70, 70, (9, 9))), HCL, BILINEAR)


@pytest.mark.parametrize("case", [*(c for c in CASES if str(c) in CHOSEN), TALL], ids=str)
def test_case(case):
    check(case, KERNELS, truncates=True)  # the interpreter does, compiled code does not


@pytest.mark.parametrize("edge", EDGES, ids=lambda f: f.__name__)
def test_edge(edge):
    edge(KERNELS)
