"""MetaDistiller and its two baselines: exits, generator, losses, meta-gradient, and a small training end to end."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdfast.meta import exact_hypergradient, meta_kd_step
from kdfast.methods import DeeplySupervised, MetaDistiller, SelfDistillation
from kdfast.methods.exits import Exit, LabelGenerator
from kdfast.models import CifarResNet
from kdfast.train.loop import ordinary_step

WIDTHS = (4, 6, 8)


def conv_norm_relu(x, conv, norm, stride=1):
    x = F.conv2d(x, conv.weight, stride=stride)
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    x = (x - mean) / (var + norm.eps).sqrt()
    return F.relu(x * norm.weight[:, None, None] + norm.bias[:, None, None])


def naive_exit(exit, x, stride):
    """1x1, stride x stride, 1x1, each with BatchNorm and ReLU; mean over the map; linear."""
    layers = list(exit.layers)
    for i, step in ((0, 1), (3, stride), (6, 1)):
        x = conv_norm_relu(x, layers[i], layers[i + 1], step)
    return x.mean((2, 3)) @ exit.classifier.weight.T + exit.classifier.bias


def naive_targets(generator, features, strides):
    """Equation 5, stage by stage from the top; each conv1x1 as a matrix product."""

    def lateral(k):
        conv = generator.lateral[k]
        return torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], features[k]) + conv.bias[:, None, None]

    top = lateral(2)
    middle = F.interpolate(top, scale_factor=2, mode="bilinear") + lateral(1)
    middle = F.conv2d(middle, generator.refine[1].weight, generator.refine[1].bias, padding=1)
    bottom = F.interpolate(middle, scale_factor=2, mode="bilinear") + lateral(0)
    bottom = F.conv2d(bottom, generator.refine[0].weight, generator.refine[0].bias, padding=1)
    return [naive_exit(generator.exits[k], g, strides[k]) for k, g in enumerate((bottom, middle))]


def naive_kl(target, logits, tau):
    p, q = F.softmax(target / tau, 1), F.softmax(logits / tau, 1)
    return (p * (p / q).log()).sum(1).mean()


def double(kind, **options):
    torch.manual_seed(0)
    return kind(CifarResNet(8, WIDTHS, in_channels=1, classes=4), **options).double().train()


def batch(count=8):
    return torch.randn(count, 1, 8, 8, dtype=torch.float64), torch.randint(4, (count,))


def flat(tensors):
    return torch.cat([x.flatten() for x in tensors])


def test_every_early_stage_has_an_exit_and_the_network_stays_bare():
    distiller = double(MetaDistiller)
    outputs = distiller.student_outputs(batch()[0])
    assert len(distiller.exits) == len(outputs.exits) == len(distiller.generator.exits) == len(WIDTHS) - 1
    assert [exit.stride for exit in distiller.exits] == [4, 2]
    assert all(x.shape == (8, 4) for x in outputs.exits)
    assert distiller.export() is distiller.student
    assert distiller.teacher is None


def test_exits_are_bottlenecks_with_a_linear_layer():
    distiller = double(MetaDistiller)
    inputs, _ = batch()
    _, features = distiller.student(inputs, features=True)
    outputs = distiller.student_outputs(inputs)
    for k, stride in enumerate((4, 2)):
        torch.testing.assert_close(outputs.exits[k], naive_exit(distiller.exits[k], features[k], stride))


@pytest.mark.parametrize(("kind", "stride"), [("bottleneck", 4), ("sepconv", 4), ("sepconv", 1), ("linear", 4)])
def test_kinds_of_exits(kind, stride):
    torch.manual_seed(0)
    exit = Exit(6, 8, classes=5, stride=stride, kind=kind)
    feature = torch.randn(2, 6, 8, 8)
    assert exit(feature).shape == (2, 5)
    if kind == "linear":
        torch.testing.assert_close(exit(feature), exit.classifier(feature.mean((2, 3))))
    else:
        assert exit.layers(feature).shape == (2, 8, 8 // stride, 8 // stride)
        assert exit.classifier.in_features == 8
    if kind == "sepconv":
        assert sum(m.groups > 1 for m in exit.layers.modules() if isinstance(m, nn.Conv2d)) == (4 if stride == 4 else 2)
        torch.testing.assert_close(exit.eval()(feature), exit.classifier(gated(exit, feature).mean((2, 3))))


def gated(exit, feature):
    gate = F.interpolate(exit.attention(feature), scale_factor=2, mode="bilinear").sigmoid()
    return exit.layers(feature * gate)


def test_generator_is_equation_5_in_values_and_gradients():
    distiller = double(MetaDistiller, generator_width=5)
    _, features = distiller.student(batch()[0], features=True)
    features = [f.detach().requires_grad_() for f in features]
    ours = distiller.generator(features)
    naive = naive_targets(distiller.generator, features, distiller.strides)
    inputs = [*features, *distiller.generator.parameters()]
    for a, b in zip(ours, naive, strict=True):
        torch.testing.assert_close(a, b)
    direction = [torch.randn_like(a) for a in ours]
    gradients = [
        torch.autograd.grad([(t * d).sum() for t, d in zip(targets, direction, strict=True)], inputs)
        for targets in (ours, naive)
    ]
    torch.testing.assert_close(*gradients)


def test_a_target_depends_on_its_own_and_deeper_stages_only():
    distiller = double(MetaDistiller)
    _, features = distiller.student(batch()[0], features=True)
    features = [f.detach().requires_grad_() for f in features]
    targets = distiller.generator(features)
    reached = [[g is not None for g in torch.autograd.grad(t.sum(), features, allow_unused=True, retain_graph=True)]
               for t in targets]  # fmt: skip
    assert reached == [[True, True, True], [False, True, True]]


def test_generator_width_is_at_most_128_unless_given():
    assert double(MetaDistiller).generator.refine[0].weight.shape == (8, 8, 3, 3)
    assert double(MetaDistiller, generator_width=3).generator.refine[0].weight.shape == (3, 3, 3, 3)
    wide = MetaDistiller(nn.Linear(1, 4), channels=(8, 256), exit="linear")
    assert wide.generator.refine[0].weight.shape == (128, 128, 3, 3)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(("alpha", "tau"), [(0.5, 1.0), (0.2, 3.0)])
def test_loss_is_equations_3_and_4_in_values_and_gradients(alpha, tau, detach):
    distiller = double(MetaDistiller, alpha=alpha, temperature=tau, detach_targets=detach)
    inputs, labels = batch()
    outputs = distiller.student_outputs(inputs)
    parts = distiller.losses(outputs, distiller.teacher_outputs(inputs), labels)

    logits, features = distiller.student(inputs, features=True)
    fixed = [f.detach() for f in features] if detach else features
    targets = naive_targets(distiller.generator, fixed, (4, 2))
    expected = F.cross_entropy(logits, labels)
    for k in range(2):
        exit = naive_exit(distiller.exits[k], features[k], (4, 2)[k])
        expected = expected + alpha * F.cross_entropy(exit, labels)
        expected = expected + (1 - alpha) * tau**2 * naive_kl(targets[k], exit, tau)
    loss = sum(parts.values())
    torch.testing.assert_close(loss, expected)
    parameters = list(distiller.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters))
    assert parts.keys() == {"task", "exits"}


def test_self_distillation_has_the_constant_final_output_as_every_target():
    distiller = double(SelfDistillation, alpha=0.3, temperature=2.0)
    inputs, labels = batch()
    outputs = distiller.student_outputs(inputs)
    loss = sum(distiller.losses(outputs, distiller.teacher_outputs(inputs), labels).values())
    expected = F.cross_entropy(outputs.logits, labels)
    for exit in outputs.exits:
        expected = expected + 0.3 * F.cross_entropy(exit, labels)
        expected = expected + 0.7 * 4 * naive_kl(outputs.logits.detach(), exit, 2.0)
    torch.testing.assert_close(loss, expected)
    parameters = list(distiller.parameters())
    gradients = [torch.autograd.grad(x, parameters, retain_graph=True) for x in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_deep_supervision_has_labels_alone():
    distiller = double(DeeplySupervised, weight=0.5)
    inputs, labels = batch()
    outputs = distiller.student_outputs(inputs)
    loss = sum(distiller.losses(outputs, distiller.teacher_outputs(inputs), labels).values())
    expected = F.cross_entropy(outputs.logits, labels) + 0.5 * sum(F.cross_entropy(x, labels) for x in outputs.exits)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("task", ["probabilities", "own"])
def test_other_tasks(task):
    """Mixed labels, and a loss of one's own: the hard term is the task's, the soft one stays."""
    options = {"task_loss": lambda z, y: F.multi_margin_loss(z, y)} if task == "own" else {}
    distiller = double(SelfDistillation, alpha=0.3, temperature=2.0, **options)
    inputs, labels = batch()
    if task == "probabilities":
        labels = torch.rand(8, 4, dtype=torch.float64).softmax(1)
    outputs = distiller.student_outputs(inputs)
    expected = distiller.task_loss(outputs.logits, labels)
    for exit in outputs.exits:
        expected = expected + 0.3 * distiller.task_loss(exit, labels)
        expected = expected + 0.7 * 4 * naive_kl(outputs.logits, exit, 2.0)
    torch.testing.assert_close(sum(distiller.losses(outputs, None, labels).values()), expected)


@pytest.mark.parametrize(
    ("tangent", "commit"),
    [("forward", "reuse"), ("forward", "rehead"), ("central", "separate"), ("jvp", "reuse"), ("exact", "reuse")],
)
@pytest.mark.parametrize(
    "options", [{}, {"detach_targets": False}, {"meta_objective": "all", "temperature": 2.0}], ids=str
)
def test_meta_gradient_is_that_of_the_whole_step_differentiated_twice(options, tangent, commit):
    distiller = double(MetaDistiller, **options)
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    meta = list(distiller.meta_parameters())
    train, validation = batch(), batch()
    ordinary_step(distiller, train, optimizer)  # so that there is momentum
    exact = flat(exact_hypergradient(distiller, train, validation, optimizer))
    meta_kd_step(distiller, train, validation, optimizer, torch.optim.SGD(meta, lr=0.0), tangent=tangent, commit=commit)
    ours = flat([p.grad for p in meta])
    assert exact.norm() > 0
    assert (ours - exact).norm() < 1e-5 * exact.norm()
    assert F.cosine_similarity(ours, exact, dim=0) > 1 - 1e-9


def test_meta_gradient_in_single_precision():
    distiller = double(MetaDistiller)
    train, validation = batch(), batch()
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1)
    exact = flat(exact_hypergradient(distiller, train, validation, optimizer))
    distiller.float()
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1)
    meta_optimizer = torch.optim.SGD(distiller.meta_parameters(), lr=0.0)
    train, validation = ((x.float(), y) for x, y in (train, validation))
    meta_kd_step(distiller, train, validation, optimizer, meta_optimizer)
    ours = flat([p.grad for p in distiller.meta_parameters()]).double()
    assert F.cosine_similarity(ours, exact, dim=0) > 0.999


def test_only_the_generator_is_meta_and_nothing_is_missing():
    distiller = double(MetaDistiller)
    meta, inner = ({id(p) for p in ps} for ps in (distiller.meta_parameters(), distiller.inner_parameters()))
    assert meta == {id(p) for p in distiller.generator.parameters()}
    assert meta.isdisjoint(inner)
    assert meta | inner == {id(p) for p in distiller.parameters()}


def test_meta_step_leaves_student_exits_and_statistics_as_an_ordinary_step_does():
    """BatchNorm of student, exits and the generator's own exits: moved once, by the step at theta."""
    train, validation = batch(), batch()
    states = []
    for meta in (False, True):
        distiller = double(MetaDistiller)
        optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1, momentum=0.9)
        if meta:
            meta_optimizer = torch.optim.SGD(distiller.meta_parameters(), lr=0.0)
            meta_kd_step(distiller, train, validation, optimizer, meta_optimizer)
        else:
            ordinary_step(distiller, train, optimizer)
        states.append(distiller.state_dict())
    assert states[0].keys() == states[1].keys()
    for name, ordinary in states[0].items():
        assert torch.equal(ordinary, states[1][name]), name
    assert states[0]["generator.exits.0.layers.1.num_batches_tracked"] == 1


def test_a_generator_of_ones_own():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTHS[-1], 4)

        def forward(self, features):
            return [self.linear(features[-1].mean((2, 3)))] * (len(features) - 1)

    distiller = double(MetaDistiller, generator=Pooled())
    batches = batch(), batch()
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1)
    expected = exact_hypergradient(distiller, *batches, optimizer)
    meta_kd_step(distiller, *batches, optimizer, torch.optim.SGD(distiller.meta_parameters(), lr=0.1))
    for p, h in zip(distiller.generator.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, h, rtol=1e-3, atol=1e-3 * h.abs().max().item())
    with pytest.raises(ValueError, match="leave it out beside a generator of your own"):
        double(MetaDistiller, generator=Pooled(), generator_width=3)


def test_generator_learns_in_every_fifth_epoch_from_the_first():
    distiller = double(MetaDistiller)
    assert distiller.meta_active and distiller.meta_halves
    active = []
    for epoch in range(11):
        distiller.start_epoch(epoch, 11)
        active.append(distiller.meta_active)
    assert [epoch for epoch, on in enumerate(active) if on] == [0, 5, 10]


def test_an_ordinary_step_leaves_the_generator_alone():
    distiller = double(MetaDistiller)
    before = [p.clone() for p in distiller.generator.parameters()]
    ordinary_step(distiller, batch(), torch.optim.SGD(distiller.inner_parameters(), lr=0.1))
    assert all(torch.equal(a, b) for a, b in zip(before, distiller.generator.parameters(), strict=True))
    assert all(p.grad is None for p in distiller.generator.parameters())


@pytest.mark.parametrize("kind", [DeeplySupervised, SelfDistillation, MetaDistiller])
def test_export_is_the_bare_network_and_the_ensemble_has_the_mean_of_all_outputs(kind):
    distiller = double(kind).eval()
    inputs, _ = batch()
    outputs = distiller.student_outputs(inputs)
    assert torch.equal(distiller.export()(inputs), outputs.logits)
    assert torch.equal(distiller.logits(outputs), outputs.logits)
    ensemble = distiller.export_ensemble()
    torch.testing.assert_close(ensemble(inputs), (outputs.logits + outputs.exits[0] + outputs.exits[1]) / 3)
    assert not any("generator" in name for name in ensemble.state_dict())


def test_meta_objective_over_all_exits():
    inputs, labels = batch()
    distiller = double(MetaDistiller, meta_objective="all")
    outputs = distiller.student_outputs(inputs)
    expected = sum(F.cross_entropy(z, labels) for z in (outputs.logits, *outputs.exits))
    torch.testing.assert_close(distiller.validation_loss(outputs, labels), expected)


def test_errors():
    network = CifarResNet(8, WIDTHS)
    with pytest.raises(ValueError, match=r"exit must be one of 'bottleneck', 'sepconv', 'linear', got 'mlp'"):
        MetaDistiller(network, exit="mlp")
    with pytest.raises(ValueError, match="strides must be 2 positive numbers, one an early stage, got"):
        MetaDistiller(network, strides=(2,))
    with pytest.raises(ValueError, match="strides must be powers of two, got 3"):
        MetaDistiller(network, strides=(3, 2), exit="sepconv")
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        MetaDistiller(network, alpha=1.5)
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        SelfDistillation(network, temperature=0)
    with pytest.raises(ValueError, match="meta_every_epochs must be at least 1, got 0"):
        MetaDistiller(network, meta_every_epochs=0)
    with pytest.raises(ValueError, match="meta_objective must be one of 'final', 'all', got 'exits'"):
        MetaDistiller(network, meta_objective="exits")
    with pytest.raises(ValueError, match="generator_width must be positive, got 0"):
        MetaDistiller(network, generator_width=0)
    with pytest.raises(TypeError, match="SelfDistillation has no weight; alpha shares an exit's loss out"):
        SelfDistillation(network, weight=2.0)
    with pytest.raises(ValueError, match=r"needs channels, .* a Linear does not tell them in `widths`"):
        MetaDistiller(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="needs classes, the number of logits: a Identity has no linear layer"):
        DeeplySupervised(nn.Identity(), channels=(2, 4))
    with pytest.raises(ValueError, match="was built for 2 feature maps, got 3; give channels"):
        MetaDistiller(network, channels=(4, 6)).student_outputs(torch.randn(2, 3, 8, 8))
    with pytest.raises(
        ValueError, match=r"An exit of stride 4 needs feature maps .* of at least 4x4, got \[2, 6, 2, 2\]"
    ):
        Exit(6, 8, 5, 4)(torch.randn(2, 6, 2, 2))


@pytest.mark.parametrize("exit", ["bottleneck", "linear"])
def test_training_end_to_end(task, exit):
    distiller = MetaDistiller(task.student(), exit=exit)
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1, momentum=0.9)
    meta_optimizer = torch.optim.Adam(distiller.meta_parameters(), lr=0.01)
    validation = task.data(64)

    def evaluate():
        with torch.no_grad():
            return distiller.validation_loss(distiller.student_outputs(validation[0]), validation[1])

    before, generator = evaluate(), flat(distiller.generator.parameters()).detach().clone()
    for epoch in range(6):
        distiller.start_epoch(epoch, 6)
        for _ in range(6):
            if distiller.meta_active:
                report = meta_kd_step(distiller, task.data(32), task.data(32), optimizer, meta_optimizer)
                assert report.validation_loss.isfinite() and not report.skipped
            else:
                ordinary_step(distiller, task.data(32), optimizer)
    assert evaluate() < 0.5 * before
    assert (flat(distiller.generator.parameters()) - generator).norm() > 0.05


def test_generator_is_any_width_of_any_number_of_stages():
    torch.manual_seed(0)
    generator = LabelGenerator((3, 5, 7, 9), classes=6, strides=(8, 4, 2), width=4, kind="bottleneck")
    features = [torch.randn(2, c, s, s) for c, s in zip((3, 5, 7, 9), (16, 8, 4, 2), strict=True)]
    assert [t.shape for t in generator(features)] == [(2, 6)] * 3
