"""Runs a file of examples/, which asserts what it claims."""

import runpy
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name):
    path, threads = EXAMPLES / f"{name}.py", torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    assert len(path.read_text(encoding="utf-8").splitlines()) < 120
