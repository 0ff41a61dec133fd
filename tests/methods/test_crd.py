"""CRD: its loss against a loop over images, its negatives, its memory, and CRD + MKD."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from kdfast.meta import meta_kd_step
from kdfast.methods import CRD, MKD, ContrastiveHead

LABELS = torch.tensor([0, 1, 2, 3, 1, 0, 2, 3, 3, 3])


def build(task, **options):
    return CRD(task.student(), task.teacher(), labels=LABELS, dimension=5, **{"negatives": 4, **options})


def test_negatives_are_all_images_of_other_classes_and_no_others(task):
    head = build(task, negatives=500).contrast
    drawn = head.draw(torch.arange(10))
    for i in range(10):
        assert set(drawn[i].tolist()) == {j for j in range(10) if LABELS[j] != LABELS[i]}


def test_loss_is_the_formula_and_the_memory_moves(task):
    distiller = build(task).double()
    head = distiller.contrast
    inputs, indices = task.data(3)[0].double(), torch.tensor([7, 0, 4])
    outputs, taught = distiller.student_outputs(inputs), distiller.teacher_outputs(inputs)
    memories = head.teacher_memory.clone(), head.student_memory.clone()
    torch.manual_seed(3)
    candidates = torch.cat([indices[:, None], head.draw(indices)], 1)
    torch.manual_seed(3)
    parts = distiller.losses(outputs, taught, (LABELS[indices], indices))
    layers, features = (head.student_embedding, head.teacher_embedding), (outputs[1][-1], taught[1][-1])
    expected, anchors = 0.0, []
    for layer, feature, memory in zip(layers, features, memories, strict=True):
        v = F.normalize(layer(feature.mean((2, 3))), dim=1)
        anchors.append(v)
        e = torch.stack(
            [torch.stack([(memory[j] @ v[i] / 0.07).exp() for j in row]) for i, row in enumerate(candidates)]
        )
        p, c = e / (e.mean().detach() * 10), 4 / 10
        for i in range(3):
            expected -= ((p[i, 0] / (p[i, 0] + c)).log() + sum(math.log(c) - (q + c).log() for q in p[i, 1:])) / 3
    torch.testing.assert_close(parts["contrast"], 0.8 * expected)
    torch.testing.assert_close(parts["task"], F.cross_entropy(outputs[0], LABELS[indices]))
    moved = F.normalize(0.5 * memories[1][indices] + 0.5 * anchors[0], dim=1)
    torch.testing.assert_close(head.student_memory[indices], moved.detach())
    others = [i for i in range(10) if i not in indices]
    assert torch.equal(head.student_memory[others], memories[1][others])
    sum(parts.values()).backward()
    assert all(p.grad is not None for p in distiller.inner_parameters())
    fresh = build(task).double()
    fresh.load_state_dict(distiller.state_dict())
    assert torch.equal(fresh.contrast.student_memory, head.student_memory)
    assert fresh.contrast.normaliser.min() > 0
    torch.testing.assert_close(distiller.validation_loss(outputs, LABELS[indices]), parts["task"])


def test_crd_with_mkd_in_a_meta_step(task):
    """The head is evaluated again for the meta-gradient: the memory sees the batch once."""
    head = ContrastiveHead(8, 10, LABELS, dimension=5, negatives=4)
    distiller = MKD(task.student(), task.teacher(), features=True, extra_losses=head)
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.05)
    meta_optimizer = torch.optim.AdamW(distiller.meta_parameters(), lr=0.01)
    inputs, indices = task.data(4)[0], torch.tensor([7, 0, 4, 1])
    with torch.no_grad():
        feature = distiller.student_outputs(inputs)[1][-1].mean((2, 3))
        v = F.normalize(head.student_embedding(feature), dim=1)
        once = F.normalize(0.5 * head.student_memory[indices] + 0.5 * v, dim=1)
    batch = inputs, (LABELS[indices], indices)
    report = meta_kd_step(distiller, batch, task.data(4), optimizer, meta_optimizer)
    assert set(report.parts) == {"kd", "contrast"}
    torch.testing.assert_close(head.student_memory[indices], once)


def test_autocast_keeps_the_scores_in_full_precision(task):
    distiller = build(task)
    inputs, indices = task.data(4)[0], torch.tensor([7, 0, 4, 1])
    losses = []
    for enabled in (False, True):
        torch.manual_seed(5)
        fresh = copy.deepcopy(distiller)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs, taught = fresh.student_outputs(inputs), fresh.teacher_outputs(inputs)
            losses.append(fresh.losses(outputs, taught, (LABELS[indices], indices))["contrast"])
    assert losses[1].dtype == torch.float32
    # the networks' own outputs are rounded to 8 bits, and scores are those times 14
    torch.testing.assert_close(losses[1], losses[0], rtol=0.1, atol=0.0)


def test_errors(task):
    with pytest.raises(ValueError, match=r"labels must be the class indices \[images\] .*, of at least 2 classes, got"):
        CRD(task.student(), task.teacher(), labels=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="negatives must be at least 1"):
        build(task, negatives=0)
    distiller = build(task)
    inputs, targets = task.data(4)
    with pytest.raises(ValueError, match=r"CRD's training targets must be \(labels, indices\), .* got Tensor"):
        distiller.losses(distiller.student_outputs(inputs), distiller.teacher_outputs(inputs), targets)
