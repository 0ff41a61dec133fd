"""perturb: values against fp64 truth over mixed lists, the rules of its size, and how it is called."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st

from kdfast.ops.perturb import perturb
from kdfast.reference.kd_kl import accumulate_dtype
from tests.fuzz import on_random_cases
from tests.laws import DTYPES, LAYOUTS

# 0-dim, empty, vectors, weights; ragged ends of vectors, of sums' blocks and of pieces
SHAPES = [(), (0,), (3, 0), (1,), (7,), (5, 3), (4, 3, 3, 3), (1025,), (40, 1000), (16384,), (2, 16385)]


def make(shapes, dtype, seed=0):
    """(theta, g, v, factors)."""
    generator = torch.Generator().manual_seed(seed)
    lists = [[torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes] for _ in range(3)]
    return *lists, [(-1) ** i * 0.1 * (1 + i) for i in range(len(shapes))]


def truth(theta, g, v, factors, radius, both):
    """The formulas, number by number in fp64; and the sum of the slope's terms by size, for its rounding."""
    theta, g, v = ([x.double() for x in tensors] for tensors in (theta, g, v))
    total = slope = terms = 0.0
    for t, y, x, f in zip(theta, g, v, factors, strict=True):
        n, norm = t.numel(), (f * x).square().sum().sqrt().item()
        slope, terms = slope + (y * f * x).sum().item(), terms + (y * f * x).abs().sum().item()
        if n:
            d = max(t.square().sum().sqrt().item(), 1e-3 * math.sqrt(n)) if t.dim() >= 2 else math.sqrt(n)
            total += (norm / d) ** 2
    epsilon = radius / math.sqrt(total) if 0 < total < math.inf else 0.0
    points = [[t + s * epsilon * f * x for t, x, f in zip(theta, v, factors, strict=True)] for s in (1, -1)]
    return points[0], points[1] if both else [], epsilon, slope, terms


def assert_close(got, want, dtype):
    ahead, behind, epsilon, slope, terms_of_slope = want
    real = accumulate_dtype(dtype)
    assert epsilon == 0 or got.epsilon > 0
    # sums of up to 2^15 products, in blocks of 2^10
    rtol = 1e-12 if real == torch.float64 else 2e-6
    for x, y, atol in ((got.epsilon, epsilon, 0), (got.slope, slope, torch.finfo(real).eps * terms_of_slope)):
        assert x.dtype == real and x.shape == ()
        torch.testing.assert_close(x.double(), torch.tensor(y, dtype=torch.float64), rtol=rtol, atol=atol)
    # what is stored is rounded once; before that terms of about 1 were, which may all but cancel
    stored, terms = (1e-12, 1e-12) if dtype == torch.float64 else (torch.finfo(dtype).eps, 4 * torch.finfo(real).eps)
    assert len(got.ahead) == len(ahead) and len(got.behind) == len(behind)
    for x, y in zip([*got.ahead, *got.behind], [*ahead, *behind], strict=True):
        assert x.dtype == dtype and x.shape == y.shape
        torch.testing.assert_close(x.double(), y, rtol=stored, atol=terms)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype, both):
    for seed in range(3):
        arguments = (*make(SHAPES, dtype, seed), 0.3, both)
        before = [x.clone() for tensors in arguments[:3] for x in tensors]
        assert_close(perturb(*arguments), truth(*arguments), dtype)
        for x, y in zip([x for tensors in arguments[:3] for x in tensors], before, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_the_displacement_itself_keeps_its_digits():
    """Not only the point, of which it is a small part: theta = 0, so that the point is the displacement."""
    theta, g, v, factors = make(SHAPES, torch.float32)
    theta = [torch.zeros_like(t) for t in theta]
    got, want = perturb(theta, g, v, factors, 1e-3, True), truth(theta, g, v, factors, 1e-3, True)
    for sign, points, exact in ((1, got.ahead, want[0]), (-1, got.behind, want[1])):
        for x, y, direction in zip(points, exact, v, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=2e-6, atol=0)
            assert x.numel() == 0 or x.abs().max() > 0 or direction.abs().max() == 0
        assert sign * points[4].sign()[0] == (v[4][0] * factors[4]).sign()


@dataclass
class Lists:
    """A random case of an op over lists of tensors."""

    shapes: list[tuple[int, ...]]
    dtype: torch.dtype
    layouts: list[str | None]  # of each list's tensors, but those without dimensions
    seed: int

    def laid(self, *lists):
        """The lists in the layouts drawn for them."""
        return [
            [LAYOUTS[layout](x) if layout and x.dim() else x for x in tensors]
            for tensors, layout in zip(lists, self.layouts, strict=True)
        ]


RANDOM_LISTS = st.builds(
    Lists,
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), min_size=1, max_size=12),
    dtype=st.sampled_from(DTYPES),
    layouts=st.lists(st.none() | st.sampled_from(list(LAYOUTS)), min_size=3, max_size=3),
    seed=st.integers(0, 2**31),
)


def test_random_shapes():
    def check(drawn):
        lists, both, size, tied = drawn
        theta, g, v, factors = make(lists.shapes, lists.dtype, lists.seed)
        v = [x * size for x in v]
        if tied:
            theta[-1], g[-1], v[-1] = theta[0], g[0], v[0]
        rest = factors, 0.1, both
        assert_close(perturb(*lists.laid(theta, g, v), *rest), truth(theta, g, v, *rest), lists.dtype)

    sizes = st.sampled_from([0.0, 1e-3, 1.0, 1e3])
    ran = on_random_cases(check, st.tuples(RANDOM_LISTS, st.booleans(), sizes, st.booleans()))
    print(f"perturb: {ran} random cases")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_near_zero_count_as_the_smallest_rms(dtype):
    theta, g, v, factors = make([(8, 8), (8,)], dtype)
    theta = [t * 0 for t in theta]
    arguments = (theta, g, v, factors, 1e-3, False)
    got = perturb(*arguments)
    assert_close(got, truth(*arguments), dtype)
    rms = (factors[0] * v[0].double()).square().mean().sqrt().item() / 1e-3  # the vector's 0.2 is nothing beside
    assert got.epsilon.item() == pytest.approx(1e-3 / rms, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_nothing_to_go_along(value):
    """w = 0, or not finite anywhere: epsilon is 0, and the points are theta, without a NaN."""
    theta, g, v, factors = make([(40, 1000), (7,), ()], torch.float32)
    if value == 0:
        v = [torch.zeros_like(x) for x in v]
    v[0][3, 3] = value
    got = perturb(theta, g, v, factors, 0.1, True)
    assert got.epsilon == 0
    for x, y, t in zip(got.ahead, got.behind, theta, strict=True):
        torch.testing.assert_close(x, t, rtol=0, atol=0)
        torch.testing.assert_close(y, t, rtol=0, atol=0)


def test_an_epsilon_beyond_its_type_is_none():
    theta, g, v, _ = make([(4, 4)], torch.float32)
    got = perturb(theta, g, v, [1e-22], 1e19, False)  # 1e41 in fp32
    assert got.epsilon == 0
    torch.testing.assert_close(got.ahead[0], theta[0], rtol=0, atol=0)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("layout", [*LAYOUTS, "channels last"])
def test_strides(layout, which):
    lists = list(make([(6, 8), (5,), (4, 3, 5, 5), (1, 4, 1, 1), ()], torch.float32))

    def change(x):
        if layout == "channels last":
            return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        return LAYOUTS[layout](x) if x.dim() else x

    want = perturb(*lists, 0.1, True)
    lists[which] = [change(x) for x in lists[which]]
    got = perturb(*lists, 0.1, True)
    for x, y in zip([*got.ahead, *got.behind, got.epsilon], [*want.ahead, *want.behind, want.epsilon], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)  # sums in another order


def test_channels_last_stays():
    x = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    got = perturb([x], [x], [x], [1.0], 0.1, False)
    assert got.ahead[0].stride() == x.stride()


def test_tied_tensors_and_mixed_types():
    """One tensor in two places; and types side by side, which run in PyTorch."""
    theta, g, v, factors = make([(6, 8), (6, 8)], torch.float32)
    tied = ([theta[0], theta[0]], [g[0], g[0]], [v[0], v[0]], factors, 0.1, True)
    assert_close(perturb(*tied), truth(*tied), torch.float32)
    mixed = [[tensors[1], tensors[0].double() / 3] for tensors in (theta, g, v)]  # numbers that fp32 does not have
    got, want = perturb(*mixed, factors, 0.1, False), truth(*mixed, factors, 0.1, False)
    for x, y, dtype, tolerance in zip(got.ahead, want[0], (torch.float32, torch.float64), (1e-6, 1e-14), strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


def test_the_compiled_kernel_is_the_reference():
    """In fp64, where both are exact, and their layouts: what runs without a compiler is the same op."""
    from kdfast.ops.perturb import _reference

    arguments = (*make(SHAPES, torch.float64), 0.1, True)
    ours, reference = torch.ops.kdfast.perturb(*arguments), _reference(*arguments)
    for x, y in zip([*ours[0], *ours[1], ours[2]], [*reference[0], *reference[1], reference[2]], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
        assert x.stride() == y.stride()


def test_opcheck():
    for dtype in DTYPES:
        theta, g, v, factors = make([(4, 3), (), (5,), (2, 3, 4, 4), (0,)], dtype)
        lists = [
            [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in y] for y in (theta, g, v)
        ]
        for both in (False, True):
            torch.library.opcheck(torch.ops.kdfast.perturb.default, (*lists, factors, 0.1, both))


def test_compile_fullgraph():
    theta, g, v, factors = make([(6, 8), (5,), ()], torch.float32)
    want = perturb(theta, g, v, factors, 0.1, True)
    got = torch.compile(lambda t, y, x: perturb(t, y, x, factors, 0.1, True), fullgraph=True)(theta, g, v)
    for x, y in zip(
        [*got.ahead, *got.behind, got.epsilon, got.slope], [*want.ahead, *want.behind, *want[2:]], strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_twice_the_same_and_threads_agree():
    arguments = (*make([(300, 1000), (100000,), (3, 5)], torch.float32), 0.1, True)
    one = perturb(*arguments)
    torch.set_num_threads(2)
    try:
        two = perturb(*arguments)
    finally:
        torch.set_num_threads(1)
    for x, y in zip([*one.ahead, *one.behind, *one[2:]], [*two.ahead, *two.behind, *two[2:]], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_wanted_gradient_is_refused(which):
    lists = list(make([(3, 2), (4,)], torch.float32))
    lists[which][1].requires_grad_()
    with pytest.raises(RuntimeError, match=r"perturb takes constants and has no gradient.*torch.no_grad\(\)"):
        perturb(*lists, 0.1, False)
    with torch.no_grad():
        assert not perturb(*lists, 0.1, False).ahead[1].requires_grad
