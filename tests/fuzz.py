"""The runner of random cases: 60 of them, always the same, or as many and as random as `make fuzz` asks for."""

import os
import secrets
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings

FUZZ_CASES = int(os.environ.get("KDFAST_FUZZ_CASES") or 0)
if FUZZ_CASES:  # set for the processes started from here too: one seed a run
    FUZZ_SEED = int(os.environ.setdefault("KDFAST_FUZZ_SEED", str(secrets.randbelow(2**32))))


def on_random_cases(check: Callable[[Any], None], strategy: st.SearchStrategy) -> int:
    """Runs `check` on 60 cases, always the same, or on those `make fuzz` asks for; returns how many different ones."""
    cases, ran = FUZZ_CASES or 60, 0

    @settings(
        max_examples=cases, derandomize=not FUZZ_CASES, database=None, deadline=None, print_blob=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def law(case):
        nonlocal ran
        check(case)
        ran += 1

    if FUZZ_CASES:
        law = hypothesis.seed(FUZZ_SEED)(law)
    law()
    assert ran >= cases, f"only {ran} different cases are drawn"
    return ran
