"""virtual_step: against torch.optim.SGD itself and fp64 truth, over mixed lists."""

import pytest
import torch
from hypothesis import strategies as st

from kdfast.ops.virtual_step import virtual_step
from tests.fuzz import on_random_cases
from tests.laws import DTYPES, LAYOUTS
from tests.ops.test_perturb import RANDOM_LISTS, SHAPES

# lr, weight_decay, momentum, dampening, nesterov
RULES = {
    "plain": (0.1, 0.0, 0.0, 0.0, False),
    "decay": (0.1, 1e-2, 0.0, 0.0, False),
    "momentum": (0.1, 1e-2, 0.9, 0.0, False),
    "dampening": (0.1, 0.0, 0.9, 0.4, False),
    "nesterov": (0.1, 1e-2, 0.9, 0.0, True),
}


def make(shapes, dtype, seed=0):
    """(theta, g, buffers)."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes] for _ in range(3)]


def optimizer_step(theta, gradients, buffers, lr, weight_decay, momentum, dampening, nesterov):
    """theta+ as torch.optim.SGD makes it, in fp64."""
    parameters = [torch.nn.Parameter(t.to(torch.float64, copy=True)) for t in theta]
    optimizer = torch.optim.SGD(
        parameters, lr=lr, weight_decay=weight_decay, momentum=momentum, dampening=dampening, nesterov=nesterov
    )
    for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
        p.grad = g.double()
        if buffers:
            optimizer.state[p]["momentum_buffer"] = buffers[i].to(torch.float64, copy=True)
    optimizer.step()
    return [p.detach() for p in parameters]


def assert_close(got, want, dtype, terms=1.0):
    """What is stored is rounded once; before that terms were, of this size, which may all but cancel in theta+."""
    stored = 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps
    for x, y in zip(got, want, strict=True):
        assert x.dtype == dtype and x.shape == y.shape
        torch.testing.assert_close(x.double(), y, rtol=stored, atol=2 * stored * terms)


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_optimizers_step(dtype, rule, buffered):
    theta, g, buffers = make(SHAPES, dtype)
    before = [x.clone() for tensors in (theta, g, buffers) for x in tensors]
    got = virtual_step(theta, g, buffers if buffered else [], *RULES[rule])
    assert_close(got, optimizer_step(theta, g, buffers if buffered else [], *RULES[rule]), dtype)
    for x, y in zip([*theta, *g, *buffers], before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_random_shapes():
    numbers = st.sampled_from([0.0, 1e-2, 0.5])
    rules = st.tuples(st.floats(1e-4, 1.0), numbers, st.sampled_from([0.0, 0.5, 0.9]), numbers, st.just(False))
    nesterov = st.tuples(st.floats(1e-4, 1.0), numbers, st.sampled_from([0.5, 0.9]), st.just(0.0), st.just(True))

    def check(drawn):
        lists, rule, buffered = drawn
        theta, g, buffers = make(lists.shapes, lists.dtype, lists.seed)
        got = virtual_step(*lists.laid(theta, g, buffers if buffered else []), *rule)
        want = optimizer_step(theta, g, buffers if buffered else [], *rule)
        steps = [y - t.double() for y, t in zip(want, theta, strict=True)]
        terms = max([1.0, *(x.abs().max().item() for x in (*theta, *steps) if x.numel())])
        assert_close(got, want, lists.dtype, terms)

    ran = on_random_cases(check, st.tuples(RANDOM_LISTS, rules | nesterov, st.booleans()))
    print(f"virtual_step: {ran} random cases")


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("layout", [*LAYOUTS, "channels last"])
def test_strides(layout, which):
    lists = make([(6, 8), (5,), (4, 3, 5, 5), (1, 4, 1, 1), ()], torch.float32)

    def change(x):
        if layout == "channels last":
            return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        return LAYOUTS[layout](x) if x.dim() else x

    want = virtual_step(*lists, *RULES["nesterov"])
    lists[which] = [change(x) for x in lists[which]]
    for x, y in zip(virtual_step(*lists, *RULES["nesterov"]), want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)  # an element may lie in a vector or at its ragged end


def test_tied_tensors_and_mixed_types():
    theta, g, buffers = make([(6, 8), (6, 8)], torch.float32)
    tied = ([theta[0]] * 2, [g[0]] * 2, [buffers[0]] * 2)
    assert_close(virtual_step(*tied, *RULES["momentum"]), optimizer_step(*tied, *RULES["momentum"]), torch.float32)
    mixed = [[x[0].bfloat16(), x[1]] for x in (theta, g, buffers)]
    got, want = virtual_step(*mixed, *RULES["nesterov"]), optimizer_step(*mixed, *RULES["nesterov"])
    for x, y, dtype in zip(got, want, (torch.bfloat16, torch.float32), strict=True):
        assert_close([x], [y], dtype)


@pytest.mark.parametrize("buffered", [False, True])
def test_the_compiled_kernel_is_the_reference(buffered):
    from kdfast.ops.virtual_step import _reference

    theta, g, buffers = make(SHAPES, torch.float64)
    for rule in RULES.values():
        arguments = (theta, g, buffers if buffered else [], *rule)
        for x, y in zip(torch.ops.kdfast.virtual_step(*arguments), _reference(*arguments), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)
            assert x.stride() == y.stride()


def test_opcheck():
    for dtype in DTYPES:
        lists = make([(4, 3), (), (5,), (2, 3, 4, 4), (0,)], dtype)
        lists = [[x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in y] for y in lists]
        for buffers in ([], lists[2]):
            torch.library.opcheck(torch.ops.kdfast.virtual_step.default, (*lists[:2], buffers, *RULES["nesterov"]))


def test_compile_fullgraph():
    lists = make([(6, 8), (5,), ()], torch.float32)
    got = torch.compile(lambda *x: virtual_step(*x, *RULES["nesterov"]), fullgraph=True)(*lists)
    for x, y in zip(got, virtual_step(*lists, *RULES["nesterov"]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_threads_agree():
    lists = make([(300, 1000), (100000,), (3, 5)], torch.float32)
    one = virtual_step(*lists, *RULES["nesterov"])
    torch.set_num_threads(2)
    try:
        two = virtual_step(*lists, *RULES["nesterov"])
    finally:
        torch.set_num_threads(1)
    for x, y in zip(one, two, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_wanted_gradient_is_refused(which):
    lists = make([(3, 2), (4,)], torch.float32)
    lists[which][1].requires_grad_()
    with pytest.raises(RuntimeError, match=r"virtual_step takes constants and has no gradient.*torch.no_grad\(\)"):
        virtual_step(*lists, *RULES["plain"])
    with torch.no_grad():
        assert not virtual_step(*lists, *RULES["plain"])[1].requires_grad
