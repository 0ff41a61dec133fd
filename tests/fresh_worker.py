"""A pytest plugin for runs with xdist on a GPU, `-p tests.fresh_worker`: an illegal access or an assertion in a kernel
leaves a process whose every later CUDA call fails. A worker in which that has happened ends, and a new one takes its
place, so that one broken kernel fails its own test and no other."""

import os
import sys

import torch


def pytest_runtest_logfinish(nodeid):
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_available() and not usable():
        print(f"{nodeid} has broken the CUDA context of {os.environ['PYTEST_XDIST_WORKER']}", file=sys.stderr)
        os._exit(1)


def usable() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
