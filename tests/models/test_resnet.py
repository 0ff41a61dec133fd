import pytest
import torch
from torch import nn

from kdfast.models import CifarResNet


@pytest.mark.parametrize(
    ("depth", "parameters"),
    # Known sizes of the option-B (projected shortcut) networks: the paper's option A has 269,722 and 853,018;
    # the two projections add 16*32 + 32*64 weights and 2*(32 + 64) BatchNorm values.
    [(20, 269_722 + 2752), (56, 853_018 + 2752)],
)
def test_parameter_count(depth, parameters):
    assert sum(p.numel() for p in CifarResNet(depth).parameters()) == parameters


def test_convolutions_equal_depth():
    network = CifarResNet(14)
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(layers) + 1 == 14  # and the linear layer


def test_features_are_the_stages_and_the_last_one_gives_the_logits():
    network = CifarResNet(8, widths=(4, 6, 8), in_channels=1, classes=7).eval()
    images = torch.randn(3, 1, 8, 8)
    logits, features = network(images, features=True)
    assert [tuple(f.shape) for f in features] == [(3, 4, 8, 8), (3, 6, 4, 4), (3, 8, 2, 2)]
    assert torch.equal(network(images), logits)
    assert torch.equal(network.classifier(features[-1].mean((2, 3))), logits)
    assert all((f >= 0).all() for f in features)


def test_forward_with_features_compiles_whole_and_transforms():
    torch.manual_seed(0)
    network = CifarResNet(8, widths=(2, 4, 4), in_channels=1).eval().double()
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    expected = network(images, features=True)

    compiled = torch.compile(lambda x: network(x, features=True), fullgraph=True, backend="eager")(images)
    torch.testing.assert_close(compiled, expected)

    parameters = dict(network.named_parameters())
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}

    def outputs(values):
        return torch.func.functional_call(network, values, (images, True))

    (logits, taps), (logits_dot, taps_dot) = torch.func.jvp(outputs, (parameters,), (directions,))
    torch.testing.assert_close((logits, taps), expected)
    step = 1e-7  # so short that no ReLU bends in between
    ahead, behind = (outputs({n: p + sign * step * directions[n] for n, p in parameters.items()}) for sign in (1, -1))
    torch.testing.assert_close(logits_dot, (ahead[0] - behind[0]) / (2 * step), rtol=1e-5, atol=1e-5)
    assert all(t.abs().max() > 0 for t in taps_dot)


@pytest.mark.parametrize("depth", [2, 9, 18])
def test_impossible_depth_is_one_sentence(depth):
    with pytest.raises(ValueError, match=rf"depth must be 6n\+2 with n >= 1 \(8, 14, 20, ...\), got {depth}"):
        CifarResNet(depth)


@pytest.mark.parametrize("widths", [(4, 8), (4, 8, 0)])
def test_impossible_widths_are_one_sentence(widths):
    with pytest.raises(ValueError, match="widths must be three positive numbers of channels, got"):
        CifarResNet(8, widths)
