"""The law of random cases finds what is planted: each fault is a small one, in a corner."""

import dataclasses

import hypothesis.strategies as st
import pytest
import torch

from tests.laws import LawfulOp, Laws


def squares(x):  # [rows, classes]
    """Mean square of the rows' softmax, in fp32 arithmetic whatever the storage."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return wide.softmax(-1).square().sum(-1)


def inputs(generator, shape, dtype, variant):
    return ((3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype),), {}


SOUND = LawfulOp(
    name="squares",
    call=squares,
    truth=squares,
    eager=None,
    inputs=inputs,
    variants={"one": {}},
    shapes={"one": (3, 5)},
    small=(3, 5),
    raw=list,
    draw=st.tuples(st.tuples(st.integers(0, 4), st.integers(1, 70)), st.just({})),
    extremes={"masked": (lambda t, k: ((t[0].index_fill(-1, torch.arange(5), -torch.inf),), k), 20)},
)


def with_gradient(change):
    """The op with `change` planted in its gradient."""

    def call(x):
        x = x * 1
        if x.requires_grad:
            x.register_hook(change)
        return squares(x)

    return call


def last_of_a_ragged_row_lost(grad):
    keep = torch.ones_like(grad)
    keep[:, -1] = grad.shape[1] % 4 != 1
    return grad * keep


FAULTS = {
    "fp32 off by 1e-5": with_gradient(lambda g: g * (1 + 1e-5) if g.dtype == torch.float32 else g),
    "bf16 off by two ulp": with_gradient(lambda g: g * (1 + 2**-6) if g.dtype == torch.bfloat16 else g),
    "a ragged row's last entry": with_gradient(last_of_a_ragged_row_lost),
    "masked classes come back": lambda x: squares(x.nan_to_num(neginf=-3.0)),
    "strides": lambda x: squares(x if x.is_contiguous() else x * 1.001),
}


def run(call):
    class Suite(Laws):
        op = dataclasses.replace(SOUND, call=call)

    Suite().test_random_shapes()


def test_a_sound_op_passes():
    run(squares)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault):
    with pytest.raises(AssertionError, match="off by"):
        run(FAULTS[fault])
