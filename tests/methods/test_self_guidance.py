"""Self-Guidance: its two passes, losses, statistics, random state, export, and a small training end to end."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdfast._torchvision import import_module
from kdfast.meta import exact_hypergradient, meta_kd_step
from kdfast.methods import SelfGuidance
from kdfast.methods.stochastic_depth import linear_survival, residual_branches
from kdfast.models import CifarResNet
from kdfast.train.loop import ordinary_step

WIDTHS = (4, 6, 8)


def norm(x, layer, training):
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    if not training:
        mean, var = layer.running_mean, layer.running_var
    x = (x - mean[:, None, None]) / (var[:, None, None] + layer.eps).sqrt()
    return x * layer.weight[:, None, None] + layer.bias[:, None, None]


def naive_pass(network, x, factors, training=True):
    """H = ReLU(factor * f(H) + shortcut(H)), block by block."""
    factors = iter(factors)
    conv, bn, _ = network.stem
    x = norm(F.conv2d(x, conv.weight, padding=1), bn, training).relu()
    for stage in network.stages:
        for block in stage:
            f = norm(F.conv2d(x, block.conv1.weight, None, block.conv1.stride, 1), block.bn1, training).relu()
            f = norm(F.conv2d(f, block.conv2.weight, padding=1), block.bn2, training)
            short = x
            if not isinstance(block.shortcut, nn.Identity):
                conv, bn = block.shortcut
                short = norm(F.conv2d(x, conv.weight, stride=conv.stride), bn, training)
            x = (next(factors) * f + short).relu()
    return x.mean((2, 3)) @ network.classifier.weight.T + network.classifier.bias


def naive_kl(target, logits, tau):
    p, q = F.softmax(target / tau, 1), F.softmax(logits / tau, 1)
    return (p * (p / q).log()).sum(1).mean()


def double(depth=14, **options):
    torch.manual_seed(0)
    distiller = SelfGuidance(CifarResNet(depth, WIDTHS, in_channels=1, classes=4), **options).double()
    for module in distiller.student.modules():
        if isinstance(module, nn.BatchNorm2d):  # no scale of 1 and shift of 0, which could hide an error
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(0.5, 1.5)
    return distiller


def batch(count=8):
    return torch.randn(count, 1, 8, 8, dtype=torch.float64), torch.randint(4, (count,))


def draws_of(distiller):
    """The draws that the next student pass makes; the random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        return torch.bernoulli(distiller.survival)


def test_survival_falls_in_a_line_from_the_first_branch_to_the_last():
    torch.testing.assert_close(linear_survival(5, 0.5), torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]))
    distiller = SelfGuidance(CifarResNet(14), last_survival=0.4)
    expected = [1 - layer / 6 * 0.6 for layer in range(1, 7)]
    assert distiller.survival.tolist() == pytest.approx(expected)
    assert "survival" not in distiller.state_dict()


def test_every_branch_survives_as_often_as_its_probability():
    distiller = double()
    kept = torch.stack([torch.bernoulli(distiller.survival) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(kept, distiller.survival, atol=0.04, rtol=0)  # 5 standard deviations of the mean


def test_passes_are_equations_3_and_4():
    distiller, (inputs, _) = double(), batch()
    drawn = draws_of(distiller)
    assert 0 < drawn.sum() < len(drawn)
    outputs = distiller.train().student_outputs(inputs)
    torch.testing.assert_close(outputs.sub, naive_pass(distiller.student, inputs, drawn))
    torch.testing.assert_close(outputs.full, naive_pass(distiller.student, inputs, distiller.survival))
    outputs = distiller.eval().student_outputs(inputs)
    assert outputs.sub is None
    torch.testing.assert_close(outputs.full, naive_pass(distiller.student, inputs, distiller.survival, training=False))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("teacher_gradient", ["task", "all", "none"])
def test_loss_is_equation_5_in_values_and_gradients(teacher_gradient, divergence):
    distiller = double(strength=0.7, temperature=2.0, teacher_gradient=teacher_gradient, divergence=divergence)
    inputs, labels = batch()
    drawn = draws_of(distiller)
    parts = distiller.train().losses(distiller.student_outputs(inputs), None, labels)

    sub = naive_pass(distiller.student, inputs, drawn)
    full = naive_pass(distiller.student, inputs, distiller.survival)
    target = full if teacher_gradient == "all" else full.detach()
    ends = (target, sub) if divergence == "forward_kl" else (sub, target)
    expected = F.cross_entropy(sub, labels) + 0.7 * 2.0**2 * naive_kl(*ends, 2.0)
    if teacher_gradient != "none":
        expected = expected + F.cross_entropy(full, labels)
    loss = sum(parts.values())
    torch.testing.assert_close(loss, expected)
    parameters = list(distiller.parameters())
    ours, naive = (torch.autograd.grad(x, parameters, materialize_grads=True) for x in (loss, expected))
    torch.testing.assert_close(ours, naive)
    assert parts.keys() == {"sub", "guidance"} | ({"full"} if teacher_gradient != "none" else set())


def test_without_the_teachers_gradient_what_the_subnetwork_leaves_out_learns_nothing():
    distiller = double(teacher_gradient="none").train()
    inputs, labels = batch()
    drawn = draws_of(distiller)
    parts = distiller.losses(distiller.student_outputs(inputs), None, labels)
    sum(parts.values()).backward()
    blocks = [block for stage in distiller.student.stages for block in stage]
    for block, kept in zip(blocks, drawn, strict=True):
        branch = [p.grad.abs().sum() for layer in (block.conv1, block.bn1, block.conv2) for p in layer.parameters()]
        assert all((g > 0) == bool(kept) for g in branch)


@pytest.mark.parametrize("batch_norm", ["teacher", "student", "both"])
def test_running_statistics_are_those_of_the_pass_that_was_chosen(batch_norm):
    distiller, (inputs, _) = double(batch_norm=batch_norm), batch()
    plain = copy.deepcopy(distiller.student).train()
    drawn = draws_of(distiller)
    distiller.train().student_outputs(inputs)
    # the same passes over a copy whose last layers of the branches are multiplied by hand
    passes = {"teacher": [distiller.survival], "student": [drawn], "both": [drawn, distiller.survival]}[batch_norm]
    blocks = [block for stage in plain.stages for block in stage]
    originals = [copy.deepcopy(block.bn2.state_dict()) for block in blocks]
    for factors in passes:
        before = [copy.deepcopy(block.state_dict()) for block in blocks]
        for block, factor, original in zip(blocks, factors, originals, strict=True):
            block.bn2.weight.data = factor * original["weight"]
            block.bn2.bias.data = factor * original["bias"]
        plain(inputs)
        for block, factor, old in zip(blocks, factors, before, strict=True):
            if not factor:  # what is left out does not run, as in stochastic depth
                for bn in ("bn1", "bn2"):
                    block.get_submodule(bn).load_state_dict(
                        {name.removeprefix(f"{bn}."): value for name, value in old.items() if name.startswith(bn)}
                    )
    for (name, ours), (_, expected) in zip(distiller.student.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(ours, expected), name
    assert distiller.student.stem[1].num_batches_tracked == len(passes)


def test_both_passes_share_every_parameter_and_leave_it_as_it_is():
    distiller = double()
    before = {name: p.clone() for name, p in distiller.named_parameters()}
    distiller.train().student_outputs(batch()[0])
    assert all(torch.equal(p, before[name]) for name, p in distiller.named_parameters())
    plain = CifarResNet(14, WIDTHS, in_channels=1, classes=4)
    assert {f"student.{name}" for name in plain.state_dict()} == set(distiller.state_dict())


def test_export_is_bit_for_bit_the_teacher():
    torch.manual_seed(0)
    distiller = SelfGuidance(CifarResNet(14, WIDTHS, in_channels=1, classes=4))
    inputs = torch.randn(8, 1, 8, 8)
    for _ in range(3):
        distiller.train().student_outputs(inputs)
    plain = distiller.eval().export().eval()
    assert type(plain) is CifarResNet
    assert plain is not distiller.student
    assert torch.equal(plain(inputs), distiller.student_outputs(inputs).full)
    assert not torch.equal(plain(inputs), distiller.student(inputs))


class Learned(SelfGuidance):
    """Its strength is learned from a validation loss."""

    def __init__(self, student, **options):
        super().__init__(student, **options)
        self.factor = nn.Parameter(torch.tensor(0.25))

    def losses(self, outputs, teacher_outputs, targets):
        parts = super().losses(outputs, teacher_outputs, targets)
        return parts | {"guidance": self.factor * parts["guidance"]}

    def meta_parameters(self):
        yield self.factor


@pytest.mark.parametrize("tangent", ["forward", "central"])
def test_displaced_passes_draw_what_the_first_drew(tangent):
    """Or the meta-gradient would be a difference between two sub-networks; "all" has nothing that is detached."""
    torch.manual_seed(0)
    distiller = Learned(CifarResNet(14, WIDTHS, in_channels=1, classes=4), teacher_gradient="all").double()
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1, momentum=0.9)
    train, validation = batch(), batch()
    exact = exact_hypergradient(distiller, train, validation, optimizer)[0]
    state = torch.get_rng_state()
    meta_optimizer = torch.optim.SGD(distiller.meta_parameters(), lr=0.0)
    meta_kd_step(distiller, train, validation, optimizer, meta_optimizer, tangent=tangent)
    assert exact != 0
    torch.testing.assert_close(distiller.factor.grad, exact, rtol=1e-5, atol=0)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.bernoulli(distiller.survival)
    assert torch.equal(after, torch.get_rng_state())  # one draw, as in an ordinary step


def test_a_seed_gives_the_same_training_again():
    def losses(seed):
        torch.manual_seed(0)
        distiller = SelfGuidance(CifarResNet(14, WIDTHS, in_channels=1, classes=4))
        data = torch.randn(16, 1, 8, 8), torch.randint(4, (16,))
        optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1)
        torch.manual_seed(seed)
        return [ordinary_step(distiller, data, optimizer).item() for _ in range(3)]

    assert losses(1) == losses(1) != losses(2)


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: import_module("torchvision.models").resnet18(num_classes=5), 8),
        (lambda: import_module("torchvision.models").resnet50(num_classes=5), 16),
        (lambda: import_module("timm").create_model("resnet10t", num_classes=5), 4),
        (lambda: import_module("timm").create_model("resnetv2_50", num_classes=5), 16),
        (lambda: vit(init_values=None), 6),
        (lambda: vit(init_values=1e-2), 6),
    ],
    ids=["resnet18", "resnet50", "timm resnet", "pre-activation", "vit", "vit with layer scale"],
)
def test_networks_of_torchvision_and_timm(build, count):
    torch.manual_seed(0)
    distiller = SelfGuidance(build())
    inputs, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 3])
    assert len(distiller.branches) == count
    loss = sum(distiller.train().losses(distiller.student_outputs(inputs), None, labels).values())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.student.parameters())
    outputs = distiller.eval().student_outputs(inputs)
    assert torch.equal(distiller.export().eval()(inputs), outputs.full)
    # with every branch left out, only the shortcuts are there: the branches' other layers have no say
    distiller.survival.zero_()
    before = distiller.student_outputs(inputs).full
    for name in distiller.branches:
        for p in distiller.student.get_submodule(name).parameters():
            p.data.normal_()
    torch.testing.assert_close(distiller.student_outputs(inputs).full, before)


def vit(**options):
    return import_module("timm").create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, embed_dim=12, num_heads=3, num_classes=5, **options
    )


def test_branches_by_name():
    """torchvision's transformer is not known by its layers' names; its user knows them."""
    model = import_module("torchvision.models").VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=5
    )
    with pytest.raises(ValueError, match="A VisionTransformer has no residual blocks known here; name the last layer"):
        SelfGuidance(model)
    names = [
        f"encoder.layers.encoder_layer_{i}.{end}" for i in range(2) for end in ("self_attention.out_proj", "mlp.3")
    ]
    distiller = SelfGuidance(model, branches=names)
    nn.init.normal_(model.heads.head.weight)  # zero at the start
    inputs = torch.randn(2, 3, 16, 16)
    full = distiller.eval().student_outputs(inputs).full
    torch.testing.assert_close(distiller.export().eval()(inputs), full)
    distiller.survival.fill_(1)
    torch.testing.assert_close(distiller.student_outputs(inputs).full, model(inputs))
    assert (full - model(inputs)).abs().max() > 1e-3


def test_layers_of_densenet_are_no_residual_branches():
    densenet = import_module("torchvision.models").DenseNet(growth_rate=4, block_config=(1, 1), num_init_features=8)
    with pytest.raises(ValueError, match="A DenseNet has no residual blocks known here"):
        residual_branches(densenet)


def test_errors():
    network = CifarResNet(8)
    with pytest.raises(ValueError, match="teacher_gradient must be one of 'task', 'all', 'none', got 'some'"):
        SelfGuidance(network, teacher_gradient="some")
    with pytest.raises(ValueError, match="divergence must be one of 'forward_kl', 'reverse_kl', got 'jsd'"):
        SelfGuidance(network, divergence="jsd")
    with pytest.raises(ValueError, match="batch_norm must be one of 'teacher', 'student', 'both', got 'none'"):
        SelfGuidance(network, batch_norm="none")
    with pytest.raises(ValueError, match=r"last_survival must be a probability in \(0, 1\], got 0"):
        SelfGuidance(network, last_survival=0)
    with pytest.raises(ValueError, match="strength must be finite and not negative, got -1"):
        SelfGuidance(network, strength=-1)
    with pytest.raises(ValueError, match="temperature must be positive and finite, got inf"):
        SelfGuidance(network, temperature=float("inf"))
    with pytest.raises(ValueError, match=r"branches must name layers of the CifarResNet, got 'stages\.9'"):
        SelfGuidance(network, branches=["stages.9"])
    with pytest.raises(
        ValueError, match=r"must end in a layer that its own parameters scale .*, got stages, a ModuleList"
    ):
        SelfGuidance(network, branches=["stages"])
    squeezed = import_module("timm").create_model("seresnet18", num_classes=5)
    with pytest.raises(ValueError, match=r"The branch of layer1\.0 ends in SEModule, which is not affine"):
        SelfGuidance(squeezed)


def test_training_end_to_end(task):
    distiller = SelfGuidance(task.student())
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1, momentum=0.9, nesterov=True)
    inputs, labels = task.data(64)

    def evaluate():
        with torch.no_grad():
            return F.cross_entropy(distiller.export().eval()(inputs), labels)

    before = evaluate()
    for _ in range(60):
        assert ordinary_step(distiller, task.data(32), optimizer).isfinite()
    assert evaluate() < 0.3 * before
