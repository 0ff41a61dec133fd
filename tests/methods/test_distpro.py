"""DistPro: pathways, transforms, weights, a search and a retraining end to end."""

import pytest
import torch
from torch.nn import functional as F

from kdfast.losses.kd_kl import kd_loss
from kdfast.meta import Process, meta_kd_step
from kdfast.methods import Distiller, DistPro, PathwayWeights, transfer
from kdfast.methods.transforms import TRANSFORMS
from kdfast.reference.pathways import hcl


def test_27_pathways_of_3_by_3_features_and_3_transforms(task):
    distiller = DistPro(task.student(), task.teacher())
    assert len(distiller.pathways) == len(set(distiller.pathways)) == 27
    assert distiller.pathways[:4] == ["s0-t0-conv1", "s0-t0-conv2", "s0-t0-conv3", "s0-t1-conv1"]
    assert distiller.weights().tolist() == pytest.approx([1 / 28] * 27)


def test_weights_are_a_softmax_with_a_bias():
    weights = PathwayWeights(3)
    weights.raw.data = torch.tensor([0.5, 1.0, 2.0])
    exp = torch.tensor([0.5, 1.0, 2.0]).exp()
    torch.testing.assert_close(weights(), exp / (exp.sum() + torch.tensor(1.0).exp()))


@pytest.mark.parametrize(("name", "convolutions"), [("conv1", 1), ("conv2", 3), ("conv3", 4)])
def test_transforms_reach_the_teachers_shape(name, convolutions):
    transform = TRANSFORMS[name](4, 6)
    convs = [m for m in transform.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == convolutions
    assert all(c.bias is None for c in convs)
    for size in ((8, 8), (4, 4), (3, 5)):  # larger, equal, smaller and not square
        assert transform(torch.randn(2, 4, 4, 4), size).shape == (2, 6, *size)


def test_transform_is_conv_norm_attention_resize_conv_norm():
    torch.manual_seed(0)
    transform = TRANSFORMS["conv2"](4, 6)
    x = torch.randn(2, 4, 4, 4)
    y = transform.project[1](transform.project[0](x))
    y = y * F.conv2d(y, transform.attention.gate.weight)
    y = y.repeat_interleave(2, 2).repeat_interleave(2, 3)  # nearest
    expected = transform.refine[0][1](F.conv2d(y, transform.refine[0][0].weight, padding=1))
    torch.testing.assert_close(transform(x, (8, 8)), expected)


def test_loss_is_the_weighted_sum_over_pathways(task):
    distiller = DistPro(task.student(), task.teacher(), scale=3.0)
    distiller.weights.raw.data.uniform_(-1, 1)
    inputs, targets = task.data(8)
    outputs, teacher_outputs = distiller.student_outputs(inputs), distiller.teacher_outputs(inputs)
    parts = distiller.losses(outputs, teacher_outputs, targets)
    expected, p = 0.0, 0
    for feature in outputs[1]:
        for target in teacher_outputs[1]:
            for _ in range(3):
                moved = distiller.transforms[p](feature, target.shape[2:])
                expected = expected + 3.0 * distiller.weights()[p] * hcl(moved, target)
                p += 1
    torch.testing.assert_close(parts["pathways"], expected)
    torch.testing.assert_close(parts["task"], F.cross_entropy(outputs[0], targets))


def test_meta_and_inner_parameters_are_apart(task):
    distiller = DistPro(task.student(), task.teacher())
    assert list(distiller.meta_parameters()) == [distiller.weights.raw]
    inner = {id(p) for p in distiller.inner_parameters()}
    assert id(distiller.weights.raw) not in inner
    assert {id(p) for p in distiller.transforms.parameters()} < inner
    assert distiller.export() is distiller.student


def process_of(distiller, rows):
    process = Process(distiller.pathways)
    for raw in rows:
        raw = torch.tensor(raw)
        process.record(raw / 10, raw)
    return process


def test_following_a_process_drops_pathways_and_keeps_the_weights_of_the_rest(task):
    distiller = DistPro(task.student(), task.teacher(), transforms=["conv1"])
    rows = [[1.0] * 9, [0.4, 0.5, 0.6] * 3, [0.0] * 9]
    distiller.follow(process_of(distiller, rows))
    inputs, targets = task.data(8)
    outputs, teacher_outputs = distiller.student_outputs(inputs), distiller.teacher_outputs(inputs)
    calls = []
    for p, transform in enumerate(distiller.transforms):
        transform.register_forward_hook(lambda *_, p=p: calls.append(p))
    kept = {0: list(range(9)), 1: [2, 5, 8], 2: []}
    for step, share in ((0, 0.0), (1, 2 / 3), (2, 1.0)):
        distiller.set_step(step)
        calls.clear()
        loss = distiller.losses(outputs, teacher_outputs, targets)["pathways"]
        assert calls == kept[step]
        assert distiller.dropped_share == pytest.approx(share)
        distances = distiller.pathway_losses(outputs[1], teacher_outputs[1], range(9))
        expected = sum(rows[step][p] / 10 * distances[p] for p in kept[step])
        torch.testing.assert_close(loss, torch.as_tensor(expected, dtype=loss.dtype))
    assert list(distiller.meta_parameters()) == []
    assert id(distiller.weights.raw) not in {id(p) for p in distiller.inner_parameters()}


def test_errors(task):
    student, teacher = task.student(), task.teacher()
    with pytest.raises(
        ValueError, match=r"transforms must be one or more of 'conv1', 'conv2', 'conv3', 'complex', got \('abf',\)"
    ):
        DistPro(student, teacher, transforms=["abf"])
    with pytest.raises(ValueError, match=r"DistPro needs student_channels, .*: a Linear does not tell them"):
        DistPro(torch.nn.Linear(2, 2), teacher)
    distiller = DistPro(student, teacher, student_channels=(4, 6))
    with pytest.raises(
        ValueError, match=r"built for 2 student and 3 teacher features, got 3 and 3; give student_channels"
    ):
        distiller.losses(distiller.student_outputs(task.data(2)[0]), teacher(task.data(2)[0], features=True), None)
    with pytest.raises(ValueError, match=r"set_step needs a process to follow; call follow"):
        distiller.set_step(0)
    with pytest.raises(
        ValueError, match=r"The process must be of this DistPro's 18 pathways \(s0-t0-conv1, ...\), got 1 \(a"
    ):
        distiller.follow(Process(["a"]))


def test_search_then_retraining_end_to_end(task):
    teacher, validation = task.teacher(), task.data(64)
    distiller = DistPro(task.student(), teacher, transforms=["conv1", "conv2"], scale=5.0)
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.05, momentum=0.9)
    meta_optimizer = torch.optim.Adam(distiller.meta_parameters(), lr=0.1, betas=(0.5, 0.999))
    process = Process(distiller.pathways)
    losses = []
    for _ in range(30):
        process.record(distiller.weights(), distiller.weights.raw)
        report = meta_kd_step(distiller, task.data(32), task.data(32), optimizer, meta_optimizer)
        losses.append(report.validation_loss)
    assert torch.stack(losses[-5:]).mean() < 0.8 * torch.stack(losses[:5]).mean()
    assert process.raw[-1].std() > 0.1  # pathways have parted

    final = DistPro(task.student(), teacher, transforms=["conv1", "conv2"], scale=5.0)
    final.follow(process.resample(40))
    optimizer = torch.optim.SGD(final.inner_parameters(), lr=0.05, momentum=0.9)
    with torch.no_grad():
        before = final.validation_loss(final.student_outputs(validation[0]), validation[1])
    for step in range(40):
        final.set_step(step)
        inputs, targets = task.data(32)
        optimizer.zero_grad()
        outputs = final.student_outputs(inputs)
        sum(final.losses(outputs, final.teacher_outputs(inputs), targets).values()).backward()
        optimizer.step()
    with torch.no_grad():
        after = final.validation_loss(final.student_outputs(validation[0]), validation[1])
    assert after < 0.5 * before


class TwoTeachers(Distiller):
    """The weights of DistPro on two soft targets: the teacher's, and the same with its classes mixed up."""

    def __init__(self, student, teacher):
        super().__init__(student, teacher)
        self.weights = PathwayWeights(2)

    def losses(self, outputs, teacher_outputs, targets):
        right = kd_loss(outputs, teacher_outputs)
        wrong = kd_loss(outputs, teacher_outputs.roll(1, dims=1))
        return {"kd": (self.weights() * torch.stack([right, wrong])).sum()}

    def meta_parameters(self):
        return self.weights.parameters()


@pytest.mark.parametrize("commit", ["reuse", "separate"])
def test_weight_leaves_what_harms_validation(commit, task):
    """The train loss alone would not tell: it is as easily lowered towards the wrong classes."""
    distiller = TwoTeachers(task.student(), task.teacher())
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.05, momentum=0.9)
    meta_optimizer = torch.optim.Adam(distiller.meta_parameters(), lr=0.2)
    for _ in range(20):
        meta_kd_step(distiller, task.data(32), task.data(32), optimizer, meta_optimizer, commit=commit)
    right, wrong = distiller.weights().tolist()
    assert right > 4 * wrong


def test_complex_transforms_on_a_triangle_are_the_published_codes_pathways(task):
    distiller = DistPro(task.student(), task.teacher(), transforms=["complex"], connections="triangular")
    assert distiller.pathways == [f"s{s}-t{t}-complex" for s in range(3) for t in range(s + 1)]
    torch.manual_seed(0)
    transform = TRANSFORMS["complex"](4, 6)
    convs = [m for m in transform.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [tuple(c.weight.shape) for c in convs] == [(4, 4, 3, 3), (1, 4, 1, 1), (4, 4, 3, 3), (6, 4, 3, 3)]
    x = torch.randn(2, 4, 4, 4)
    y = transform.reduce(x)
    y = transform.middle(y * transform.attention.gate(y)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(transform(x, (8, 8)), transform.refine(y))


def test_attention_of_a_transform():
    x = torch.randn(2, 4, 3, 3)
    for kind in ("linear", "sigmoid", "none"):
        transform = TRANSFORMS["conv2"](4, 6, attention=kind)
        y = transform.project(x)
        gate = {"linear": lambda g, y: g(y), "sigmoid": lambda g, y: g(y).sigmoid(), "none": lambda g, y: 1}[kind]
        torch.testing.assert_close(transform(x, (3, 3)), transform.refine(y * gate(transform.attention.gate, y)))
    with pytest.raises(ValueError, match="attention must be one of 'linear', 'sigmoid', 'none', got 'softmax'"):
        TRANSFORMS["conv2"](4, 6, attention="softmax")


@pytest.mark.parametrize(
    ("normalisation", "formula"),
    [
        ("biased_softmax", lambda a: a.exp() / (a.exp().sum() + torch.tensor(2.0).exp())),
        ("softmax", lambda a: a.exp() / a.exp().sum()),
        ("l1_biased", lambda a: a.abs() / (a.abs().sum() + 2)),
        ("l1", lambda a: a.abs() / a.abs().sum()),
        ("sigmoid", lambda a: 1 / (1 + (-a).exp())),
    ],
)
def test_normalisations(normalisation, formula):
    weights = PathwayWeights(3, bias=2.0, normalisation=normalisation).double()
    weights.raw.data = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(weights(), formula(weights.raw.data))


def test_a_process_is_carried_over_by_depth_or_by_name(task):
    process = Process([f"s{s}-t{t}-conv1" for s in range(3) for t in range(3)])
    raw = torch.arange(9.0)
    process.record(raw / 45, raw)
    names = [f"s{s}-t{t}-conv1" for s in range(5) for t in range(2)]
    carried = transfer(process, names)
    # 5 features on 3: 0 1 1 2 2 (halves go up); 2 on 3: the ends
    source = [3 * s + t for s in (0, 1, 1, 2, 2) for t in (0, 2)]
    assert carried.raw[0].tolist() == [float(i) for i in source]
    assert carried.weights[0].tolist() == pytest.approx([i / 45 / source.count(i) for i in source])
    swapped = transfer(process, ["a", "b"], {"a": "s1-t0-conv1", "b": "s0-t1-conv1"})
    assert swapped.raw[0].tolist() == [3, 1]
    distiller = DistPro(task.student(), task.teacher(), transforms=["conv1"])
    distiller.follow(transfer(process, distiller.pathways))
    with pytest.raises(
        ValueError, match=r"Pathway s0-t0-conv2 takes the weights of s2-t2-conv2, which the process does"
    ):
        transfer(process, ["s0-t0-conv2"])
    with pytest.raises(ValueError, match="rule must be 'depth', a mapping or a function"):
        transfer(process, names, "width")


def test_weights_that_do_not_change(task):
    distiller = DistPro(task.student(), task.teacher())
    distiller.fix()
    for step in (0, 5):
        distiller.start_step(step)
        assert distiller._step_weights.tolist() == pytest.approx([1 / 27] * 27)  # table 1: 1 / L
    process = process_of(distiller, [[1.0] * 27, [2.0] * 26 + [0.0]])
    distiller.fix(process.at(1))
    distiller.start_step(7)
    assert distiller._step_weights.tolist() == pytest.approx([0.2] * 26)
    assert list(distiller.meta_parameters()) == []


def test_saved_share_counts_multiply_adds(task):
    distiller = DistPro(task.student(), task.teacher(), transforms=["conv1", "conv3"], clip=0.5)
    inputs = task.data(2)[0]
    before = {k: v.clone() for k, v in distiller.state_dict().items()}
    cheap = distiller.saved_share(process_of(distiller, [[0.0, 1.0] * 9]), inputs)
    dear = distiller.saved_share(process_of(distiller, [[1.0, 0.0] * 9]), inputs)
    assert cheap + dear == pytest.approx(1)
    assert dear > 0.8
    assert all(torch.equal(v, before[k]) for k, v in distiller.state_dict().items())


def test_features_of_a_transformer(task):
    class Tokens(torch.nn.Module):
        widths = (6, 6)

        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Conv2d(1, 6, 2, 2), torch.nn.Linear(6, 4)

        def forward(self, x, features=False):
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            tokens = torch.cat([tokens[:, :1], tokens], 1)  # a class token before 16 patches
            logits = self.head(tokens.mean(1))
            return (logits, [tokens, tokens]) if features else logits

    distiller = DistPro(Tokens(), task.teacher(), transforms=["conv1"])
    inputs, targets = task.data(4)
    outputs, taught = distiller.student_outputs(inputs), distiller.teacher_outputs(inputs)
    maps = [x[:, 1:].transpose(1, 2).reshape(4, 6, 4, 4) for x in outputs[1]]
    pairs = [(s, t) for s in maps for t in taught[1]]
    moved = [hcl(distiller.transforms[p](s, t.shape[2:]), t) for p, (s, t) in enumerate(pairs)]
    expected = (distiller.weights() * torch.stack(moved)).sum()
    torch.testing.assert_close(distiller.losses(outputs, taught, targets)["pathways"], expected)
