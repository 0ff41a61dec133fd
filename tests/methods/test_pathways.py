"""hcl against its definition written out, and the weighted sum."""

import pytest
import torch
from torch.nn import functional as F

from kdfast.reference.pathways import hcl, pathway_losses, pathways


def written_out(a, b):
    """The published loss: each map pooled on its own, levels by height, divided by the weights used."""
    total, weight, loss = 1.0, 1.0, F.mse_loss(a, b)
    for level in (4, 2, 1):
        if level >= a.shape[2]:
            continue
        weight /= 2
        total += weight
        loss = loss + weight * F.mse_loss(F.adaptive_avg_pool2d(a, level), F.adaptive_avg_pool2d(b, level))
    return loss / total


@pytest.mark.parametrize("height", [8, 7, 5, 4, 3, 2, 1])  # 7: overlapping windows; 4, 3: two levels; 2: one; 1: none
def test_hcl_is_the_published_loss(height):
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, height, 6, dtype=torch.float64), torch.randn(2, 3, height, 6, dtype=torch.float64)
    torch.testing.assert_close(hcl(a, b), written_out(a, b))


@pytest.mark.parametrize(("height", "total"), [(8, 1.875), (4, 1.75), (2, 1.5), (1, 1.0)])
def test_weights_of_the_levels(height, total):
    stripes = torch.ones(1, 1, height, 8)
    stripes[..., ::2] = -1  # mean zero in every window: seen at full resolution only
    torch.testing.assert_close(hcl(stripes, torch.zeros_like(stripes)), torch.tensor(1 / total))
    constant = torch.full((1, 1, height, 8), 2.0)  # seen equally at every level
    torch.testing.assert_close(hcl(constant, torch.zeros_like(constant)), torch.tensor(4.0))


def test_low_precision_is_accumulated_in_float32():
    a, b = torch.randn(2, 3, 8, 8).bfloat16(), torch.randn(2, 3, 8, 8).bfloat16()
    assert hcl(a, b).dtype == torch.float32
    torch.testing.assert_close(hcl(a, b), hcl(a.float(), b.float()))


def test_pathways_is_linear_in_the_weights():
    torch.manual_seed(0)
    students = [torch.randn(2, c, h, h, dtype=torch.float64) for c, h in ((3, 8), (4, 4), (5, 2))]
    teachers = [torch.randn_like(x) for x in students]
    weights = torch.rand(3, dtype=torch.float64, requires_grad=True)
    distances = pathway_losses(students, teachers)
    loss = pathways(students, teachers, weights)
    torch.testing.assert_close(loss, (weights * distances).sum())
    assert torch.equal(torch.autograd.grad(loss, weights)[0], distances)
