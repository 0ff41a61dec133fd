"""The parts of `make gpu` that keep one broken kernel from hiding what the others do, played without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import apart

ROOT = Path(__file__).resolve().parents[1]
QUICK = "def test_{0}(benchmark):\n    benchmark.pedantic(sum, args=([1],), rounds=3)\n"


def test_benchmarks_survive_each_other(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark would see that and measure nothing
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_a.py").write_text(QUICK.format("a"))
    (tmp_path / "test_broken.py").write_text(QUICK.format("broken_cuda") + "    import os; os._exit(7)\n")
    (tmp_path / "test_slow.py").write_text(
        QUICK.format("slow") + "def test_sleeps():\n    import time; time.sleep(60)\n"
    )
    out = tmp_path / "all.json"
    code = apart.main(["--folder", str(tmp_path), "--seconds", "12", "--out", str(out), "-k", "a or cuda or slow"])
    assert code == 7
    assert [b["name"] for b in json.loads(out.read_text())["benchmarks"]] == ["test_a", "test_slow"]


def test_a_worker_whose_context_is_broken_is_replaced(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_kernels.py").write_text(
        "import os, torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "broken = []\n"
        "def synchronize():\n"
        "    if broken: raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "torch.cuda.synchronize = synchronize\n"
        "def test_one():\n"
        "    broken.append(1)\n"
        "    torch.cuda.synchronize()\n"
        "def test_two():\n"
        "    torch.cuda.synchronize()\n"
        "def test_three():\n"
        "    torch.cuda.synchronize()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "1", "-p", "tests.fresh_worker", "-q", "-rA", "-p", "no:benchmark",
         str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert "illegal memory access" in done.stdout
    assert "2 passed" in done.stdout, done.stdout + done.stderr
