"""KDFAST_CHECK_VALUES=1: what lies in device tensors is looked at before a kernel runs, and only then."""

import importlib

import pytest
import torch

from kdfast import kd_loss
from kdfast.losses import _checks
from kdfast.losses import kd_kl as public

CLASSES = 5


def bad_label(device="cpu"):
    student, teacher = torch.randn(4, CLASSES, device=device), torch.randn(4, CLASSES, device=device)
    return student, teacher, torch.tensor([0, -100, CLASSES, 1], device=device)


def nan_teacher(device="cpu"):
    student, teacher, _ = bad_label(device)
    teacher[1:3, 2] = torch.nan  # row 1 is ignored, and may hold anything
    return student, teacher, torch.tensor([0, -100, 2, 1], device=device)


BAD = {
    "label": (bad_label, r"^labels must be in \[0, 5\) or ignore_index \(-100\), got 5\.$"),
    "teacher": (nan_teacher, r"^teacher_logits hold NaN \(first in row 2\); check the teacher's weights"),
}


class KernelRan(Exception):
    pass


@pytest.fixture
def as_on_a_device(monkeypatch):
    """CPU tensors are taken for a device's: reading them costs a wait. The kernel says that it was reached."""

    def kernel(*args):
        raise KernelRan

    monkeypatch.setattr(_checks, "_waits", lambda x: _checks._eager())
    monkeypatch.setattr(_checks, "_readable", lambda x: False)
    monkeypatch.setattr(public, "kd_kl", kernel)


@pytest.fixture(params=["label", "teacher"])
def bad(request):
    return BAD[request.param]


def test_found_before_the_kernel(bad, as_on_a_device, monkeypatch):
    make, sentence = bad
    monkeypatch.setattr(_checks, "CHECK_VALUES", True)
    with pytest.raises(ValueError, match=sentence):
        kd_loss(*make())


def test_not_looked_at_unasked(bad, as_on_a_device, monkeypatch):
    monkeypatch.setattr(_checks, "CHECK_VALUES", False)
    with pytest.raises(KernelRan):
        kd_loss(*bad[0]())


def test_good_values_pass(as_on_a_device, monkeypatch):
    monkeypatch.setattr(_checks, "CHECK_VALUES", True)
    student, teacher, labels = bad_label()
    labels[2] = 2
    teacher[1] = torch.nan  # ignored
    with pytest.raises(KernelRan):
        kd_loss(student, teacher, labels)


def test_not_inside_torch_func(as_on_a_device, monkeypatch):
    """There a value cannot be read, asked for or not."""
    monkeypatch.setattr(_checks, "CHECK_VALUES", True)
    student, teacher, labels = bad_label()
    with pytest.raises(KernelRan):
        torch.func.grad(lambda s: kd_loss(s, teacher, labels))(student)


@pytest.mark.parametrize(("value", "asked"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_variable(value, asked, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delenv("KDFAST_CHECK_VALUES", raising=False)
        if value is not None:
            patch.setenv("KDFAST_CHECK_VALUES", value)
        assert importlib.reload(_checks).CHECK_VALUES is asked
    importlib.reload(_checks)


@pytest.mark.cuda
def test_on_a_gpu(bad, monkeypatch):
    make, sentence = bad
    monkeypatch.setattr(_checks, "CHECK_VALUES", False)
    assert kd_loss(*make("cuda")).isnan()
    monkeypatch.setattr(_checks, "CHECK_VALUES", True)
    with pytest.raises(ValueError, match=sentence):
        kd_loss(*make("cuda"))
