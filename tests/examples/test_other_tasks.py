import pytest

from tests.examples import test_classifiers
from tests.examples.running import EXAMPLES, run

NAMES = ["segmentation", "depth", "detector_backbone", "learned_loss_weights"]


@pytest.mark.parametrize("name", NAMES)
def test_example_holds_what_it_claims(name):
    run(name)


def test_every_example_is_run():
    (mark,) = test_classifiers.test_example_holds_what_it_claims.pytestmark
    assert sorted([*NAMES, *mark.args[1]]) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


def test_every_example_is_listed():
    text = (EXAMPLES.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    assert all(f"examples/{path.name}" in text for path in EXAMPLES.glob("*.py"))
