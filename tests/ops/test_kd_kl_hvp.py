"""kd_kl_hvp: the kernel on kd_kl's cases, the door before it by the law suite, and second order through kd_loss."""

import pytest
import torch
from hypothesis import strategies as st

from kdfast import kd_loss
from kdfast.ops import kd_kl_hvp as ops
from kdfast.reference.kd_kl import Options, accumulate_dtype
from kdfast.reference.kd_kl import kd_kl as definition
from kdfast.reference.kd_kl import kd_kl_hvp as composed
from tests.fuzz import on_random_cases
from tests.laws import DTYPES, SANITIZED, LawfulOp, Laws, close
from tests.ops.kd_kl_cases import NAMES, Case, make
from tests.ops.kd_kl_hvp_cases import CASES, DIRECTIONS, EDGES, check, direction, truth

KERNEL = torch.ops.kdfast.kd_kl_hvp.default


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case):
    check(case, KERNEL)


@pytest.mark.parametrize("edge", EDGES, ids=lambda f: f.__name__)
def test_edge(edge):
    edge(KERNEL)


@pytest.mark.parametrize("scale", [(300.0, 0.0), (1.0, 1e4), (1e-3, 0.0)], ids=["huge spread", "far", "tiny spread"])
@pytest.mark.parametrize("divergence", [0, 1, 2])
def test_kernel_on_extremes(scale, divergence):
    """Against the same numbers in fp64; fp32 rounds logits over tau, up to 3000 here, by up to 2e-4."""
    factor, shift = scale
    generator = torch.Generator().manual_seed(1)
    z = [factor * 3 * torch.randn(6, 37, generator=generator, dtype=torch.float64) for _ in range(2)]
    options = Options(4.0, 2.5, divergence=divergence)
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        tensors = ((z[0] + shift).to(dtype), (z[1] - shift).to(dtype), *(None,) * 5)
        w = direction(tensors, DIRECTIONS["all"])
        for h, exact in zip(
            KERNEL(*tensors, *w, *options, True, True)[:2], truth(tensors, options, w)[:2], strict=True
        ):
            unit = rtol * exact.abs().max().clamp(min=1e-3 if factor < 1 else 1).item()
            torch.testing.assert_close(h.double(), exact, rtol=rtol, atol=unit)


def _random_case(rows, classes, tau_s, tau_t, alpha, smoothing, divergence, scale, dtype, hard, temperatures, *flags):
    options = Options(tau_s, tau_t, alpha if hard else 0.0, smoothing, divergence=divergence, scale=scale)
    return Case("random", rows, classes, options, dtype, hard, temperatures, *flags)


RANDOM_CASES = st.builds(
    _random_case,
    st.integers(1, 6), st.integers(1, 70) | st.integers(250, 1100), st.floats(0.5, 8), st.floats(0.5, 8),
    st.sampled_from([0.3, 1.0]), st.sampled_from([0.0, 0.1, 1.0]), st.integers(0, 2), st.integers(0, 2),
    st.sampled_from(DTYPES), st.sampled_from(["", "labels", "target", "ignored"]), st.sampled_from(["", "one", "rows"]),
    st.booleans(), st.booleans(),
)  # fmt: skip


def check_backward_stable(case):
    """The kernel's error is at most that of inputs moved by some roundings of the arithmetic, or twice PyTorch's.

    A draw may cancel as deep as it likes: moving every logit and temperature by one rounding, up or down (of a 1 where
    they are smaller: an exponential is rounded too), shows how deep, and 32 times that is allowed (random signs cancel,
    the errors of a polynomial need not; 128 times in a sanitized build, which sums a row in one long chain);
    beside it, as in the law of random cases, 32 ulp of the largest entry (1e-9 in fp64, where the truth has errors
    too), the rounding to storage, and that of the terms where they cancel: for a temperature's sum over a row
    entropies times a temperature's square, for a logit (of a single class, say, where all is zero) a few divided by
    one.
    """
    tensors = make(case)
    real = accumulate_dtype(case.dtype)
    eps = torch.finfo(real).eps
    part = 1e-9 if real == torch.float64 else 32 * eps
    w = direction(tensors, DIRECTIONS["all"])
    exact = truth(tensors, case.options, w)
    generator = torch.Generator().manual_seed(0)
    moved = []
    for _ in range(2):
        signs = [None if x is None else torch.randint(2, x.shape, generator=generator) * 2 - 1 for x in tensors[:4]]
        inputs = [
            x if x is None else x.double() + (eps * y * x.double().abs().clamp(min=1)).nan_to_num(0, 0, 0)
            for x, y in zip(tensors[:4], signs, strict=True)
        ]
        moved.append(truth((*inputs, *tensors[4:]), case.options, w))
    theirs = composed(*tensors, case.options, direction=w)
    ours = KERNEL(*tensors, *w, *case.options, True, True)
    for name, x, e, t, *near in zip(NAMES, ours, exact, theirs, *moved, strict=True):
        if e is None:
            assert x.numel() == 0, name
            continue
        assert x.shape == e.shape, name
        finite = e.isfinite() & t.isfinite()
        assert not (x.double().isfinite() ^ e.isfinite())[finite].any(), name
        size = lambda y, e=e, finite=finite: torch.where(finite, (y.double() - e).abs(), 0.0).max()  # noqa: E731
        stored = 0.0 if x.dtype == real else torch.finfo(x.dtype).eps
        largest = torch.where(finite, e.abs(), 0.0).max()
        factor = 128 if SANITIZED else 32
        terms = 160 if "temperature" in name else 16
        allowed = 2 * size(t) + factor * max(map(size, near)) + (part + 2 * stored) * largest + terms * eps
        assert size(x) <= allowed, f"{name}: off by {size(x):.2e}, allowed {allowed:.2e}, largest {largest:.2e}"


def test_random_shapes_of_the_kernel():
    """In every storage type; the law suite's random cases, below, are the door's, in fp64."""
    ran = on_random_cases(check_backward_stable, RANDOM_CASES)
    print(f"kd_kl_hvp's kernel: {ran} random cases")


# ---------------------------------------------------------------- the door: kernel or composed
def flat(parts):
    return torch.cat([x if x.dim() == 2 else x.unsqueeze(-1) for x in parts if x is not None], -1)


def call(student, teacher, w_student, w_teacher, tau_s=None, tau_t=None, *, labels=None, options):
    w = (w_student, w_teacher, None, None)
    return flat(ops.kd_kl_hvp(student, teacher, tau_s, tau_t, labels, None, None, options, w))


def exact(student, teacher, w_student, w_teacher, tau_s=None, tau_t=None, *, labels=None, options):
    """The definition, by the transforms of torch.func, which nest."""
    there = tuple(range(2 if tau_s is None else 4))
    primals = (student, teacher) if tau_s is None else (student, teacher, tau_s, tau_t)

    def total(s, t, ts=None, tt=None):
        return definition(s, t, ts, tt, labels, None, None, options).sum()

    tangents = (w_student, w_teacher, *(torch.zeros_like(x) for x in primals[2:]))
    product = torch.func.jvp(torch.func.grad(total, argnums=there), primals, tangents)[1]
    return flat(product)


def inputs(generator, shape, dtype, variant):
    rows, classes = shape
    real = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [(2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(4)]
    if variant.get("taus"):
        tensors += [1 + 3 * torch.rand(rows, generator=generator, dtype=torch.float64).to(real) for _ in range(2)]
    labels = torch.randint(classes, (rows,), generator=generator) if variant["options"].alpha > 0 else None
    return tuple(tensors), {"options": variant["options"], "labels": labels}


def raw():
    generator = torch.Generator().manual_seed(0)
    s, t, w = (torch.randn(4, 9, generator=generator) for _ in range(3))
    tau, labels = torch.tensor([2.0]), torch.tensor([0, 3, -100, 8])
    mixed = Options(1.0, 1.0, 0.4, 0.1, -100, 1, 1)
    return [
        (KERNEL, (s, t, *(None,) * 5, w, None, None, None, *Options(4.0, 4.0), False, True)),
        (KERNEL, (s, t, tau, tau, labels, None, None, w, w, tau, tau, *mixed, True, True)),
    ]  # fmt: skip


class TestKdKlHvp(Laws):
    """Two more derivatives on top of the second: the door has to see that they may be asked for."""

    op = LawfulOp(
        name="kd_kl_hvp",
        call=call,
        truth=exact,
        eager=exact,
        inputs=inputs,
        variants={
            "forward": {"options": Options(4.0, 2.5)},
            "reverse-labels-taus": {"options": Options(1.0, 1.0, 0.4, 0.1, divergence=1, scale=1), "taus": True},
            "soft_ce-taus": {"options": Options(1.0, 1.0, divergence=2), "taus": True},
        },
        shapes={"padded": (5, 10), "in place": (3, 300)},
        small=(2, 3),
        dtypes=[torch.float64],  # third derivatives are composed; fp32 and 16 bits are test_kernel's
        raw=raw,
        draw=st.tuples(
            st.tuples(st.integers(0, 5), st.integers(1, 40)),
            st.builds(
                lambda taus, *kind: {"options": Options(2.0, 3.0, 0.5, 0.1, -100, *kind), "taus": taus},
                st.booleans(), st.integers(0, 2), st.integers(0, 2),
            ),
        ),
        extremes={"large": (lambda tensors, kwargs: (tuple(10 * t for t in tensors[:2]) + tensors[2:], kwargs), 1000)},
    )  # fmt: skip


# ---------------------------------------------------------------- second order through kd_loss
def launched(run):
    """What `run` gives, and how often the kernel was called for it, be it from Python or from a node in C++."""
    with torch.autograd.profiler.profile() as seen:
        found = run()
    return found, sum(event.name == "kdfast::kd_kl_hvp" for event in seen.function_events)


def meta_gradient(loss, student, teacher, tau, w):
    (first,) = torch.autograd.grad(loss(student, teacher, tau), student, create_graph=True)
    return torch.autograd.grad((first * w).sum(), (teacher, tau))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "soft_ce"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_last_derivative_is_one_kernel(divergence, dtype):
    """The exact meta-gradient: through the student's gradient into the teacher and a temperature."""
    case = next(c for c in CASES if c.regime == "ignored")
    student, teacher, _, _, labels, _, weight = make(case)
    student, teacher = (x.to(dtype).requires_grad_() for x in (student, teacher))
    real = torch.float64 if dtype == torch.float64 else torch.float32
    tau, weight = torch.tensor(3.0, dtype=real, requires_grad=True), weight.to(real)
    w = torch.randn(student.shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    def ours(s, t, tau):
        return kd_loss(s, t, labels, weight=weight, student_temperature=tau, divergence=divergence)

    def exact(s, t, tau):
        options = Options(alpha=0.5, divergence=["forward_kl", "reverse_kl", "soft_ce"].index(divergence))
        per_row = tau.reshape(1)
        return definition(s, t, per_row, per_row, labels, None, weight.double(), options).sum() / case.rows

    got, launches = launched(lambda: meta_gradient(ours, student, teacher, tau, w))
    want = meta_gradient(exact, *(x.detach().double().requires_grad_() for x in (student, teacher, tau)), w.double())
    assert launches == 1
    rtol = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1.6e-2}[dtype]  # bf16: 4 roundings of 2^-8
    for g, x in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), x, rtol=rtol, atol=rtol * x.abs().max().item())


def test_third_order_is_exact_and_composed():
    student, teacher = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def gradient(s, t):
        return torch.autograd.grad(kd_loss(s, t, student_temperature=2.0), (s, t), create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, (student, teacher))

    def second(**options):
        return torch.autograd.grad(gradient(student, teacher)[0].square().sum(), student, **options)[0]

    composed, launches = launched(lambda: second(create_graph=True))
    assert launches == 0
    last, launches = launched(second)
    assert launches == 1
    close(last, composed.detach())


def test_forward_mode_over_the_second_order():
    """A tangent on the inputs of a double backward: the kernel would lose it without a word."""
    student, tangent = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    teacher, w = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)

    def hvp(s, loss):
        (first,) = torch.autograd.grad(loss(s), s, create_graph=True)
        return torch.autograd.grad((first * w).sum(), s)[0]

    def along(loss):
        with torch.autograd.forward_ad.dual_level():
            s = torch.autograd.forward_ad.make_dual(student.clone().requires_grad_(), tangent)
            return torch.autograd.forward_ad.unpack_dual(hvp(s, loss)).tangent

    options = Options(2.0, 2.0)
    got, launches = launched(lambda: along(lambda s: kd_loss(s, teacher, student_temperature=2.0, reduction="sum")))
    step = 1e-5
    low, high = (
        hvp((student + e * tangent).requires_grad_(), lambda s: definition(s, teacher, options=options).sum())
        for e in (-step, step)
    )
    torch.testing.assert_close(
        got, (high - low) / (2 * step), rtol=1e-6, atol=1e-8
    )  # step^2, over a central difference
    assert launches == 0


def test_a_vjp_called_after_its_transform_has_ended():
    """torch.func hands the saved tensors back still wrapped."""
    student, teacher, w = (torch.randn(3, 5, dtype=torch.float64) for _ in range(3))

    def loss(s):
        return kd_loss(s, teacher, student_temperature=2.0)

    _, pull = torch.func.vjp(torch.func.grad(loss), student)
    want = torch.func.jvp(torch.func.grad(loss), (student,), (w,))[1]
    close(pull(w)[0], want)
    with torch.no_grad():
        close(pull(w)[0], want)


def test_zeros_without_memory():
    """A loss that one row's output does not reach: autograd's zero tangents are tensors without storage."""
    student, labels = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 1, 2])

    def scaled(loss):
        return lambda s: (0.3 * loss(s)).sum()

    def ours(s):
        return kd_loss(s, s.detach(), labels, alpha=1.0, reduction="none")

    def theirs(s):
        return torch.nn.functional.cross_entropy(s, labels, reduction="none")

    got, want = (torch.func.jacrev(torch.func.jacfwd(scaled(f)))(student) for f in (ours, theirs))
    close(got, want)


def test_threads_agree():
    s, t, w = (torch.randn(300, 1000) for _ in range(3))
    args = (s, t, *(None,) * 5, w, w, None, None, *Options(2.0, 2.0), True, True)
    one = KERNEL(*args)
    torch.set_num_threads(2)
    try:
        two = KERNEL(*args)
    finally:
        torch.set_num_threads(1)
    for x, y in zip(one, two, strict=True):
        close(x, y, 0, 0)
