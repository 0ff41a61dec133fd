"""The law suite on Triton's incorrect_brier under its interpreter. Collected only by test_incorrect_brier_triton.py, in
a process of its own: TRITON_INTERPRET has to be set before the kernels are imported, and the dispatcher is told to
take them for CPU tensors."""

import dataclasses

import pytest
import torch

from kdfast.ops import incorrect_brier as ops
from kdfast.triton import incorrect_brier as kernels
from tests.laws import Laws
from tests.ops import test_incorrect_brier as compiled

# numpy, which plays the GPU, warns of the infinities that masked classes and absent columns are made of.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

launches = {"incorrect_brier": 0, "incorrect_brier_backward": 0}
OVERRIDE = torch.library.Library("kdfast", "IMPL", "CPU")


def counted(name):
    def launch(*args):
        launches[name] += 1
        return getattr(kernels, name)(*args)

    return launch


for name in launches:
    OVERRIDE.impl(name, counted(name), "CPU", allow_override=True)
# made of the two
OVERRIDE.impl("incorrect_brier_value_and_grad", ops._reference_value_and_grad, "CPU", allow_override=True)


class TestIncorrectBrierTriton(Laws):
    op = dataclasses.replace(
        compiled.TestIncorrectBrier.op,
        shapes={"one tile": (6, 10), "a ragged tile": (3, 100)},
        small=(3, 4),
    )
    test_random_shapes = None  # 60 examples are the compiled kernels' part


test_ties = compiled.test_the_first_of_equal_logits_is_the_prediction
test_all_right = compiled.test_all_right_is_exactly_nothing
test_ignored = compiled.test_ignored_rows_may_hold_anything
test_nothing_counts = compiled.test_nothing_counts
test_bad_rows = compiled.test_bad_rows_are_nan_right_or_wrong_and_stay_alone


@pytest.mark.parametrize("labels", ["index", "soft"])
def test_several_tiles(labels):
    """Wider than a tile, the largest logit in the last one, or twice, tiles apart."""
    (logits,), kwargs = compiled.inputs(torch.Generator().manual_seed(0), (4, 9001), torch.float32, {"labels": labels})
    logits[0, 9000] = logits[1, 9000] = logits[1, 5] = logits[1].max() + 1
    if labels == "index":
        kwargs["labels"][:2] = torch.tensor([9000, 9000])
    for z, call in ((logits.double(), compiled.truth), (logits, compiled.incorrect_brier)):
        z.requires_grad_()
        value = call(z, **kwargs, reduction="none")
        (grad,) = torch.autograd.grad(value.sum(), z)
        if call is compiled.truth:
            want = value.detach(), grad
    assert (want[0][:2] > 0).tolist() == ([False, True] if labels == "index" else [True, True])
    torch.testing.assert_close(value.detach().double(), want[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(grad.double(), want[1], rtol=1e-5, atol=1e-7)


def test_it_was_triton_that_ran():
    assert min(launches.values()) > 100
