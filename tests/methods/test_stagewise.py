"""StageByStage: what learns when, to the bit; the parts as the whole; the schedules; the cache."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdfast.methods import StageByStage
from kdfast.methods.frozen import FrozenCache
from kdfast.train.loop import ordinary_step


class Pool(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def parts_of(network):
    stem = nn.Sequential(network.stem, network.stages[0])
    return [stem, network.stages[1], network.stages[2]], nn.Sequential(Pool(), network.classifier)


def build(task, **options):
    student, teacher = task.student(), task.teacher()
    return StageByStage(student, teacher, student_parts=parts_of(student), teacher_parts=parts_of(teacher), **options)


def sgd(distiller):
    return torch.optim.SGD(distiller.inner_parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


def test_only_the_stage_at_hand_moves_to_the_bit(task):
    """Momentum and weight decay of one optimizer reach nothing that is frozen, BatchNorm statistics neither."""
    distiller = build(task)
    optimizer = sgd(distiller)
    stages, head = parts_of(distiller.student)
    for phase in range(4):
        distiller.start_epoch(phase, 4)
        assert int(distiller.stage) == phase
        distiller.train()
        before = copy.deepcopy([m.state_dict() for m in (*stages, head)])
        adapters = copy.deepcopy([m.state_dict() for m in distiller.adapters])
        teacher = copy.deepcopy(distiller.teacher.state_dict())
        for _ in range(2):
            ordinary_step(distiller, task.data(8), optimizer)
        for i, (module, old) in enumerate(zip((*stages, head), before, strict=True)):
            changed = {k for k, v in module.state_dict().items() if not torch.equal(v, old[k])}
            assert changed == (set(old) if i == phase else set()), i
        for i, (module, old) in enumerate(zip(distiller.adapters, adapters, strict=True)):
            assert all(torch.equal(v, old[k]) == (i != phase) for k, v in module.state_dict().items())
        assert all(torch.equal(v, teacher[k]) for k, v in distiller.teacher.state_dict().items())


def test_losses_are_the_formulas(task):
    distiller = build(task).double()
    inputs, targets = task.data(4)
    inputs = inputs.double()
    for phase in range(3):
        distiller.set_stage(phase)
        student = inputs
        for i, stage in enumerate(parts_of(copy.deepcopy(distiller.student))[0][: phase + 1]):
            student = stage.train(i == phase)(student)
        taught = distiller.teacher(inputs, features=True)[1][phase]
        expected = (distiller.adapters[phase](student) - taught).square().mean()
        loss = distiller.losses(distiller.student_outputs(inputs), distiller.teacher_outputs(inputs), targets)
        assert list(loss) == ["distance"]
        torch.testing.assert_close(loss["distance"], expected)
    distiller.set_stage(3)
    outputs = distiller.student_outputs(inputs)
    assert distiller.teacher_outputs(inputs) is None
    loss = distiller.losses(outputs, None, targets)["task"]
    torch.testing.assert_close(loss, F.cross_entropy(distiller.student.eval()(inputs), targets))


def test_networks_run_only_as_far_as_needed(task):
    distiller = build(task)
    student, teacher = parts_of(distiller.student), parts_of(distiller.teacher)
    ran = []
    for role, (stages, head) in (("s", student), ("t", teacher)):
        for i, module in enumerate((*stages, head)):
            # the last layer inside a part: the parts here are new containers of the same layers
            list(module.modules())[-1].register_forward_hook(lambda *_, name=f"{role}{i}": ran.append(name))
    for phase, expected in enumerate((["s0", "t0"], ["s0", "s1", "t0", "t1"], ["s0", "s1", "s2", "t0", "t1", "t2"])):
        distiller.set_stage(phase)
        ran.clear()
        inputs, targets = task.data(4)
        distiller.losses(distiller.student_outputs(inputs), distiller.teacher_outputs(inputs), targets)
        assert sorted(set(ran)) == expected


def test_maps_of_other_sizes_are_resized_and_eval_gives_logits(task):
    """A teacher whose first stage already halves the map."""
    student = task.student()
    teacher = nn.ModuleList([nn.Conv2d(1, 5, 3, 2, 1), nn.Conv2d(5, 6, 3, 2, 1), nn.Conv2d(6, 7, 3, 2, 1)])
    distiller = StageByStage(student, teacher, student_parts=parts_of(student), teacher_parts=(teacher, nn.Identity()))
    inputs, targets = task.data(4)
    outputs = distiller.student_outputs(inputs)
    assert outputs.shape == (4, 4, 8, 8)
    loss = distiller.losses(outputs, distiller.teacher_outputs(inputs), targets)["distance"]
    moved = F.interpolate(distiller.adapters[0](outputs), (4, 4), mode="bilinear")
    torch.testing.assert_close(loss, (moved - teacher[0](inputs)).square().mean())
    assert distiller.logits(outputs).shape == (4, 4)
    distiller.eval()
    assert torch.equal(distiller.student_outputs(inputs), student(inputs))
    with pytest.raises(ValueError, match="A stage has its loss in train mode only"):
        distiller.losses(student(inputs), None, targets)


def test_schedules(task):
    distiller = build(task, schedule=(1, 2, 3))
    stages, factors = [], []
    for epoch in range(16):
        distiller.start_epoch(epoch, 16)
        stages.append(int(distiller.stage))
        factors.append(distiller.lr_factor)
    assert stages == [0] + [1] * 2 + [2] * 3 + [3] * 10
    assert factors[6:] == pytest.approx([1] * 3 + [0.1] * 3 + [0.01] * 3 + [0.001])
    even = build(task)
    assert [even.start_epoch(e, 9) or int(even.stage) for e in range(9)] == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    with pytest.raises(ValueError, match="schedule must leave epochs for the head, got 6 for the stages of 6"):
        distiller.start_epoch(0, 6)
    with pytest.raises(ValueError, match="at least an epoch a phase, 4 in all, got 3"):
        even.start_epoch(0, 3)


def test_plateau_drops_the_rate_thrice_then_goes_on_and_survives_a_checkpoint(task):
    distiller = build(task, schedule="plateau", patience=2)
    seen, epoch = [], 0
    distances = [4.0, 3.0] + [3.0] * 6
    for distance in distances:
        distiller.start_epoch(epoch, 100)
        distiller.distance_sum += torch.tensor([distance, 1.0])
        distiller.end_epoch(None)
        seen.append((int(distiller.stage), distiller.lr_factor))
        epoch += 1
        if epoch == 5:  # in the middle: a fresh one goes on where this one stood
            fresh = build(task, schedule="plateau", patience=2)
            fresh.load_state_dict(distiller.state_dict())
            distiller = fresh
    distiller.start_epoch(epoch, 100)
    seen.append((int(distiller.stage), distiller.lr_factor))
    assert [s for s, _ in seen] == [0] * 8 + [1]
    assert [f for _, f in seen] == pytest.approx([1] * 4 + [0.1] * 2 + [0.01] * 2 + [1])
    # a stage that keeps improving ends when its share of the epochs left is over
    assert int(distiller.progress[0]) == 8
    for epoch in range(9, 8 + 92 // 3 + 1):
        assert int(distiller.stage) == 1
        distiller.start_epoch(epoch, 100)
    assert int(distiller.stage) == 2


def test_state_dict_restores_the_stage(task):
    distiller = build(task)
    distiller.set_stage(2)
    fresh = build(task)
    fresh.load_state_dict(distiller.state_dict())
    learning = {name for name, p in fresh.student.named_parameters() if p.requires_grad}
    assert learning == {n for n, _ in fresh.student.named_parameters() if n.startswith("stages.2")}
    task.student().load_state_dict(distiller.export().state_dict())
    assert distiller.export() is distiller.student


def test_halved_stages_are_the_same_network(task):
    distiller = build(task, halved=1)
    assert len(distiller.adapters) == 4 and distiller.phases == 5
    whole, _ = parts_of(distiller.student)
    distiller.eval()
    x = task.data(4)[0]
    first, second = distiller._parts[0][:2]
    assert torch.equal(second(first(x)), whole[0](x))
    with pytest.raises(ValueError, match=r"halved must be in \[0, 3\]"):
        build(task, halved=4)
    with pytest.raises(ValueError, match=r"Stage 1 cannot be halved: .* got Sequential of 1"):
        build(task, halved=2)


def test_cache_gives_the_same_outputs_and_runs_nothing_twice(task):
    plain = build(task)
    cached = copy.deepcopy(plain)
    cached._cache = FrozenCache(12)
    for distiller in (plain, cached):
        distiller.set_stage(1)
    calls = []
    cached.teacher.stages[0].register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    batches = [task.data(8), task.data(8)]
    for inputs, _ in batches + batches:
        torch.testing.assert_close(cached.student_outputs(inputs), plain.student_outputs(inputs))
        torch.testing.assert_close(cached.teacher_outputs(inputs), plain.teacher_outputs(inputs))
    assert calls == [8, 8, 4]  # 12 are kept; 4 of the second batch run again
    cached.set_stage(2)
    assert cached._cache._rows == {}


def test_errors(task):
    student, teacher = task.student(), task.teacher()
    with pytest.raises(ValueError, match=r"needs student_parts, .*: a Linear has no method parts"):
        StageByStage(nn.Linear(2, 2), teacher, teacher_parts=parts_of(teacher))
    stages, head = parts_of(student)
    with pytest.raises(ValueError, match="as many stages, at least 1, got 2 and 3"):
        StageByStage(student, teacher, student_parts=(stages[:2], head), teacher_parts=parts_of(teacher))
    with pytest.raises(
        ValueError, match=r"hold all its parameters; \d+ are in none, stages.2.0.conv1.weight the first"
    ):
        StageByStage(
            student, teacher, student_parts=([*stages[:2], nn.Identity()], head), teacher_parts=parts_of(teacher)
        )
    wrong = (stages, nn.Sequential(head, nn.Softmax(1)))
    with pytest.raises(ValueError, match="must give what the student returns"):
        StageByStage(student, teacher, student_parts=wrong, teacher_parts=parts_of(teacher))
    with pytest.raises(
        ValueError, match=r"schedule must be 'even', 'plateau' or the epochs of each of the 3 stages, got"
    ):
        build(task, schedule=(1, 2))
    with pytest.raises(ValueError, match="patience must be at least 1 epoch, got 0"):
        build(task, patience=0)
    with pytest.raises(ValueError, match=r"stage must be in \[0, 3\], the last meaning the head, got 4"):
        build(task).set_stage(4)


def test_training_end_to_end(task):
    torch.manual_seed(1)
    distiller, validation = build(task), task.data(64)
    optimizer = sgd(distiller)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for epoch in range(12):
        distiller.start_epoch(epoch, 12)
        distiller.train()
        for _ in range(8):
            ordinary_step(distiller, task.data(32), optimizer)
        distiller.end_epoch(None)
    distiller.eval()
    accuracy = (distiller.student_outputs(validation[0]).argmax(1) == validation[1]).float().mean()
    assert accuracy > 0.6  # of 4 classes
