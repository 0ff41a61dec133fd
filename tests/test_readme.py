"""The README's code runs as it stands."""

import re
from pathlib import Path

import torch

from kdfast.models import CifarResNet

ROOT = Path(__file__).resolve().parent.parent


def test_python_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    assert len(blocks[0].splitlines()) <= 12
    torch.manual_seed(0)
    batch = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
    names = {
        "student": CifarResNet(8, (4, 8, 8)),
        "teacher": CifarResNet(8, (8, 8, 8)),
        "train_loader": [batch] * 2,
        "validation_loader": [batch] * 2,
    }
    exec(blocks[0], names)
    assert names["report"].loss.isfinite()
    assert set(torch.load("student.pt")) == set(names["student"].state_dict())
    names |= {
        "student_logits": torch.randn(4, 3),
        "teacher_logits": torch.randn(4, 3),
        "labels": torch.tensor([0, 1, 2, 0]),
    }
    exec(blocks[1], names)
    assert names["loss"] > 0


def test_links_and_targets_exist():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([\w./]+)\)", text):
        assert (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", text):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
