import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_holds_what_it_claims(path):
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(path), run_name="__main__")  # it asserts
    finally:
        torch.set_num_threads(threads)
    assert len(path.read_text().splitlines()) < 80
