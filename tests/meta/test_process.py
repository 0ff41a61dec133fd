"""The record of a search: what goes in comes out, and stretches linearly."""

import pytest
import torch
from safetensors.torch import save_file

from kdfast.meta import Process

NAMES = ["s0-t0-conv1", "s0-t1-conv1"]


def recorded(rows):
    process = Process(NAMES)
    for row in rows:
        process.record(torch.tensor(row), 10 * torch.tensor(row))
    return process


def test_records_a_copy_of_each_step():
    process, weights = Process(NAMES), torch.tensor([0.25, 0.5], requires_grad=True)
    process.record(weights, weights)
    with torch.no_grad():
        weights.zero_()
    process.record(weights, weights)
    assert len(process) == 2
    assert process.weights.tolist() == [[0.25, 0.5], [0.0, 0.0]]
    assert not process.weights.requires_grad
    process.record(weights, weights)  # after it has been read
    assert process.raw.shape == (3, 2)


def test_round_trip(tmp_path):
    process = recorded([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    process.save(tmp_path / "process.safetensors")
    loaded = Process.load(tmp_path / "process.safetensors")
    assert loaded.pathways == NAMES
    assert torch.equal(loaded.weights, process.weights)
    assert torch.equal(loaded.raw, process.raw)
    loaded.record(torch.zeros(2), torch.zeros(2))
    assert len(loaded) == 4


def test_load_refuses_another_file(tmp_path):
    save_file({"weights": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors must be a file of Process.save, got format None"):
        Process.load(tmp_path / "other.safetensors")


def test_interpolation_is_linear_and_keeps_the_ends():
    process = recorded([[0.0, 1.0], [0.2, 0.0], [0.2, 0.5]])
    longer = process.resample(5)
    expected = [[0.0, 1.0], [0.1, 0.5], [0.2, 0.0], [0.2, 0.25], [0.2, 0.5]]
    torch.testing.assert_close(longer.weights, torch.tensor(expected))
    torch.testing.assert_close(longer.raw, 10 * torch.tensor(expected))
    assert torch.equal(process.resample(3).weights, process.weights)
    torch.testing.assert_close(process.resample(2).weights, process.weights[[0, 2]])
    assert process.resample(1).weights.tolist() == [[0.0, 1.0]]
    assert recorded([[0.3, 0.4]]).resample(4).weights.shape == (4, 2)


def test_at_gives_both_and_stops_at_the_end():
    process = recorded([[0.0, 1.0], [0.2, 0.0]])
    assert process.at(1).weights.tolist() == pytest.approx([0.2, 0.0])
    assert process.at(1).raw.tolist() == pytest.approx([2.0, 0.0])
    for step in (2, -1):
        with pytest.raises(ValueError, match=rf"step must be in \[0, 2\).*got {step}; use process.resample"):
            process.at(step)


def test_dropped_share_counts_raw_weights_at_or_below_the_clip():
    assert recorded([[0.05, 0.1], [0.04, 0.03]]).dropped_share(0.5) == 0.75


def test_errors():
    with pytest.raises(ValueError, match=r"weights must be \[2\], one a pathway, got \[3\]"):
        Process(NAMES).record(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"A process of 0 steps cannot be resampled to 4"):
        Process(NAMES).resample(4)
    with pytest.raises(ValueError, match=r"An empty process drops nothing"):
        Process(NAMES).dropped_share(0.5)
