"""A task that small networks learn in a few steps."""

import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdfast.models import CifarResNet

CLASSES = 4


def data(count):
    """A prototype for each class, and noise."""
    prototypes = torch.randn(CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(CLASSES, (count,))
    return prototypes[targets] + torch.randn(count, 1, 8, 8), targets


def network(widths):
    return CifarResNet(8, widths, in_channels=1, classes=CLASSES)


def train(network: nn.Module, steps: int):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        inputs, targets = data(32)
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
    return network


@pytest.fixture
def task():
    torch.manual_seed(0)
    return types.SimpleNamespace(
        data=data,
        student=lambda: network((4, 6, 8)),
        teacher=lambda: train(network((6, 8, 10)), 20).requires_grad_(False).eval(),
    )
