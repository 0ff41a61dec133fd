"""Small networks and distillers on which a meta-step takes milliseconds."""

import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdfast.losses.kd_kl import kd_loss
from kdfast.methods import MKD, Distiller, DistPro


class Tiny(nn.Module):
    """Two convolutions and a linear layer, with BatchNorm or with dropout."""

    def __init__(self, widths=(4, 6), norm=True, dropout=0.0):
        super().__init__()
        self.widths = widths
        self.conv1 = nn.Conv2d(1, widths[0], 3, padding=1, bias=not norm)
        self.conv2 = nn.Conv2d(widths[0], widths[1], 3, stride=2, padding=1, bias=not norm)
        self.norm1 = nn.BatchNorm2d(widths[0]) if norm else nn.Identity()
        self.norm2 = nn.BatchNorm2d(widths[1]) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(widths[1], 5)

    def forward(self, x, features=False):  # [batch, 1, 6, 6]
        a = torch.relu(self.norm1(self.conv1(x)))
        b = self.dropout(torch.relu(self.norm2(self.conv2(a))))
        logits = self.classifier(self.dropout(b.mean((2, 3))))
        return (logits, [a, b]) if features else logits


class Connected(Distiller):
    """One head with all there is: a learned weight and temperature, and a connector with BatchNorm and dropout."""

    def __init__(self, student, teacher):
        super().__init__(student, teacher)
        self.connector = nn.Sequential(
            nn.Conv2d(student.widths[1], teacher.widths[1], 1), nn.BatchNorm2d(teacher.widths[1]), nn.Dropout(0.2)
        )
        self.phi = nn.Parameter(torch.tensor([0.3, 2.0]))

    def student_outputs(self, inputs):
        return self.student(inputs, features=True)

    def teacher_outputs(self, inputs):
        with torch.no_grad():
            return self.teacher(inputs, features=True)

    def logits(self, outputs):
        return outputs[0]

    def losses(self, outputs, teacher_outputs, targets):
        feature = F.mse_loss(self.connector(outputs[1][1]), teacher_outputs[1][1])
        return {
            "kd": kd_loss(outputs[0], teacher_outputs[0], targets, student_temperature=self.phi[1]),
            "feature": self.phi[0] * feature,
        }

    def meta_parameters(self):
        return iter([self.phi])


def batch(count=12):
    return torch.randn(count, 1, 6, 6), torch.randint(5, (count,))


def distiller(head, norm=True, dropout=0.0):
    student, teacher = Tiny((4, 6), norm, dropout), Tiny((5, 7))
    teacher(batch(32)[0])  # moves the BatchNorm statistics off their start
    if head == "pathways":
        return DistPro(student, teacher)
    return Connected(student, teacher) if head == "connected" else MKD(student, teacher, alpha=0.1)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return types.SimpleNamespace(Network=Tiny, batch=batch, distiller=distiller)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
