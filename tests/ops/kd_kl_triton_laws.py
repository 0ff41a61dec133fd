"""The law suite on Triton's kernels under its interpreter. Collected only by test_kd_kl_triton_laws.py, in a process
of its own: TRITON_INTERPRET has to be set before the kernels are imported, and the dispatcher is told to take them
for CPU tensors."""

import dataclasses

import pytest
import torch

from kdfast.ops import kd_kl as ops
from kdfast.triton import kd_kl as kernels
from tests.laws import Laws
from tests.ops.test_kd_kl import VARIANTS
from tests.ops.test_kd_kl import TestKdKl as Compiled

# numpy, which plays the GPU, warns of the infinities that masked classes and absent columns are made of.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

launches = {"kd_kl": 0, "kd_kl_backward": 0}
OVERRIDE = torch.library.Library("kdfast", "IMPL", "CPU")


def counted(name):
    def launch(*args):
        launches[name] += 1
        return getattr(kernels, name)(*args)

    return launch


for name in launches:
    OVERRIDE.impl(name, counted(name), "CPU", allow_override=True)
OVERRIDE.impl("kd_kl_value_and_grad", ops._reference_value_and_grad, "CPU", allow_override=True)  # made of the two

# The interpreter takes 10 ms a launch: one variant a divergence, and the hard labels in all their forms.
CHOSEN = (
    "reverse", "labels-own-exponential", "ignored-rows-weighted-mean", "mixup-targets-sum", "rows-product-scale",
    "jsd-labels-softcap-rows", "dkd-ignored-weighted-rows",
)  # fmt: skip


class TestKdKlTriton(Laws):
    op = dataclasses.replace(
        Compiled.op,
        variants={name: VARIANTS[name] for name in CHOSEN},
        shapes={"one tile": (5, 10), "a ragged tile": (3, 100)},
        small=(2, 3),
    )
    test_random_shapes = None  # 60 examples are the compiled kernels' part


def test_it_was_triton_that_ran():
    assert min(launches.values()) > 100
