"""Triton's kd_kl_hvp against the definition, on a CPU under Triton's interpreter."""

from tests.ops.interpreted import run_interpreted


def test_interpreted(tmp_path):
    run_interpreted("kd_kl_hvp_triton_interpreted.py", tmp_path)
