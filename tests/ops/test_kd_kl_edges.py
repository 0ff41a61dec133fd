"""kd_kl where the law suite does not look: empty and one-class inputs, masks, mixed types, threads."""

import pytest
import torch

from kdfast import KDLoss, kd_loss
from kdfast.ops import kd_kl as ops
from kdfast.reference.kd_kl import Options
from tests.laws import close


def test_hinton_by_hand():
    """Two classes, by pencil: p = (1/2, 1/2), q = (3/4, 1/4); KL = log(2/sqrt 3), times tau^2 = 4."""
    student = torch.tensor([[2 * torch.tensor(3.0, dtype=torch.float64).log(), 0.0]])
    loss = kd_loss(student, torch.zeros(1, 2, dtype=torch.float64), student_temperature=2.0)
    close(loss, 4 * torch.log(torch.tensor(2 / 3**0.5, dtype=torch.float64)))


def test_equal_logits_have_no_divergence_and_shifts_do_not_matter():
    z = 5 * torch.randn(16, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    close(kd_loss(z, z), torch.zeros((), dtype=torch.float64))
    other = z.flip(0)
    close(kd_loss(z + 7, other - 3), kd_loss(z, other), rtol=1e-12)
    assert kd_loss(z, other) > 0


def test_ignored_rows_may_hold_anything():
    student, teacher = torch.randn(3, 8), torch.randn(3, 8)
    labels = torch.tensor([1, -100, 2])
    want = kd_loss(student[[0, 2]], teacher[[0, 2]], labels[[0, 2]], reduction="mean")
    student[1], teacher[1] = torch.nan, torch.inf
    student.requires_grad_()
    got = kd_loss(student, teacher, labels, reduction="mean")
    close(got, want, rtol=1e-6, atol=1e-7)
    got.backward()
    assert student.grad[1].eq(0).all()
    assert student.grad.isfinite().all()


def test_no_row_counts():
    student = torch.randn(2, 5, requires_grad=True)
    loss = kd_loss(student, torch.randn(2, 5), torch.tensor([-100, -100]), reduction="mean")
    loss.backward()
    assert loss == 0
    assert student.grad.eq(0).all()
    assert kd_loss(torch.zeros(0, 5), torch.zeros(0, 5)) == 0


def test_one_class_has_nothing_to_say():
    student = torch.randn(4, 1, requires_grad=True)
    loss = kd_loss(student, torch.randn(4, 1), torch.zeros(4, dtype=torch.int64))
    loss.backward()
    close(loss.detach(), torch.zeros(()), 0, 1e-7)
    close(student.grad, torch.zeros(4, 1), 0, 1e-7)


def test_a_class_only_the_student_masks_is_infinitely_bad():
    student, teacher = torch.zeros(1, 3), torch.zeros(1, 3)
    student[0, 0] = -torch.inf
    assert kd_loss(student, teacher) == torch.inf
    assert kd_loss(teacher, student).isfinite()  # the teacher's masked class asks nothing of the student


def test_weights_learn():
    student, teacher, weight = (torch.rand(s, dtype=torch.float64, requires_grad=True) for s in ((4, 5), (4, 5), (4,)))
    labels = torch.tensor([0, 1, -100, 2])
    for reduction in ("none", "sum", "mean", "batchmean"):
        assert torch.autograd.gradcheck(
            lambda s, w, r=reduction: kd_loss(s, teacher.detach(), labels, weight=w, reduction=r), (student, weight)
        )
        close(
            kd_loss(student, teacher, labels, weight=weight, reduction=reduction),
            kd_loss(student, teacher, labels, weight=weight.detach(), reduction=reduction),
        )


def test_one_temperature_for_both_gets_both_gradients():
    student, teacher = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    tau = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: kd_loss(student, teacher, student_temperature=t), (tau,))


def test_mixed_dtypes_use_the_wider():
    student = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(4, 6)
    loss = kd_loss(student, teacher)
    loss.backward()
    wide = kd_loss(student.detach().float().requires_grad_(), teacher)
    close(loss.detach(), wide.detach(), 0, 0)
    assert student.grad.dtype == torch.bfloat16


def test_no_grad_and_module():
    student, teacher = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    with torch.no_grad():
        assert not kd_loss(student, teacher).requires_grad
    criterion = KDLoss(alpha=0.2, student_temperature=3.0)
    labels = torch.tensor([0, 1, 2, 3])
    close(
        criterion(student, teacher, labels), kd_loss(student, teacher, labels, alpha=0.2, student_temperature=3.0), 0, 0
    )
    assert "alpha=0.2" in repr(criterion)
    with pytest.raises(TypeError, match=r"KDLoss takes the keyword arguments of kd_loss \(.*\), got tau"):
        KDLoss(tau=3.0)


def test_threads_agree():
    student, teacher = torch.randn(300, 1000, requires_grad=True), torch.randn(300, 1000)
    one = torch.autograd.grad(kd_loss(student, teacher), student)[0]
    torch.set_num_threads(2)
    try:
        two = torch.autograd.grad(kd_loss(student, teacher), student)[0]
    finally:
        torch.set_num_threads(1)
    close(one, two, 0, 0)


def test_compiled_inside_torch_func():
    """There the op's jvp would be silent zeros and Dynamo refuses the Function: the door must choose the reference."""
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    tangent = torch.randn(3, 5)

    def directional(s):
        return torch.func.jvp(lambda z: kd_loss(z, teacher), (s,), (tangent,))[1]

    want = (torch.func.grad(lambda s: kd_loss(s, teacher))(student) * tangent).sum()
    got = torch.compile(directional, fullgraph=True)(student)  # fp64: so is a plain (z * 2.0).sum() under this pair
    close(got.to(want.dtype), want, rtol=1e-5, atol=1e-6)
    got = torch.compile(torch.func.grad(lambda s: kd_loss(s, teacher)), fullgraph=True)(student)
    close(got, torch.func.grad(lambda s: kd_loss(s, teacher))(student), rtol=1e-5, atol=1e-6)


def test_eager_apply_is_the_public_apply():
    """The shortcut round autograd.Function.apply gives what the public one gives."""
    student, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    args = (student, teacher, None, None, None, None, None, Options(2.0, 2.0), 1.0)
    public, ours = ops.KdKl.apply(*args)[0], ops._apply(*args)[0]
    close(ours, public, 0, 0)
    close(torch.autograd.grad(ours, student)[0], torch.autograd.grad(public, student)[0], 0, 0)


@pytest.mark.parametrize("logits", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("labels", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_probabilities_of_another_type(logits, labels):
    """Kernels read target probabilities in the type of the arithmetic, whatever type they are given in."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, generator=generator, dtype=torch.float64).to(logits) for _ in range(2))
    target = torch.rand(3, 5, generator=generator, dtype=torch.float64).softmax(-1).to(labels)
    exact = kd_loss(student.double(), teacher.double(), target.double())
    torch.testing.assert_close(kd_loss(student, teacher, target).double(), exact, rtol=1e-6, atol=0)


def test_many_cotangents_at_once():
    """autograd.grad(is_grads_batched=True), whose vmap is not torch.func's."""
    student, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    factors = torch.tensor([1.0, -2.0, 0.5])
    (one,) = torch.autograd.grad(kd_loss(student, teacher), student)
    (batch,) = torch.autograd.grad(kd_loss(student, teacher), student, factors, is_grads_batched=True)
    torch.testing.assert_close(batch, factors[:, None, None] * one)


def test_a_scaled_loss_scales_the_gradient_made_with_it():
    """Loss scaling (AMP, gradient accumulation) comes after the gradient was made."""
    student, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    (one,) = torch.autograd.grad(kd_loss(student, teacher), student)
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        s, t = student.detach().to(device).requires_grad_(), teacher.to(device)
        (1024 * kd_loss(s, t, fuse_backward=True)).backward()
        torch.testing.assert_close(s.grad.cpu(), 1024 * one, rtol=1e-5, atol=1e-6)
