"""Every benchmark file in a process of its own, all results in one JSON file, written anew after each: a kernel that
breaks on a GPU takes its process with it, and neither it nor a run that is cut short takes the others' results.

    python -m benchmarks.apart -k cuda --seconds 300 --out runs/gpu/benchmark.json
    python -m benchmarks.apart -k cuda --out runs/gpu/data.json data
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHARES = {"kd_kl": 4, "meta_step": 5, "pathways": 2, "kd_kl_exits": 1, "kd_kl_topk": 1, "kd_kl_hvp": 1}  # others: 1
NO_TESTS = 5  # pytest's exit code


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.apart", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("names", nargs="*", metavar="name", help="a benchmark, such as kd_kl; all by default")
    parser.add_argument("--seconds", type=float, default=300, help="of all together; each has a share of what is left")
    parser.add_argument("--folder", type=Path, default=HERE, help="of the files test_*.py")
    parser.add_argument("-k", default="", help="pytest's, which of their tests")
    given = parser.parse_args(arguments)
    found = [path.stem.removeprefix("test_") for path in sorted(given.folder.glob("test_*.py"))]
    names = given.names or sorted(found, key=lambda n: list(SHARES).index(n) if n in SHARES else len(SHARES))
    shares = [SHARES.get(name, 1) for name in names]
    stop, record, worst = time.monotonic() + given.seconds, None, 0
    for i, name in enumerate(names):
        share = shares[i] / sum(shares[i:])
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results.json"
            code = run(given.folder / f"test_{name}.py", given.k, results, share * (stop - time.monotonic()))
            record = merged(record, results)
        if record is not None:
            given.out.write_text(json.dumps(record, indent=1) + "\n")
        if code not in (0, NO_TESTS):
            print(f"benchmarks of {name}: exit code {code}", flush=True)
            worst = worst or code
    return worst


def run(file: Path, which: str, results: Path, seconds: float) -> int:
    """pytest's exit code. When the time is over it is interrupted, and what it has until then still counts."""
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-k", which, "--benchmark-only"]
    process = subprocess.Popen([*command, f"--benchmark-json={results}"])
    for harder, patience in ((None, max(seconds, 1)), (signal.SIGINT, 20), (signal.SIGKILL, None)):
        if harder is not None:
            process.send_signal(harder)
        try:
            return process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("what was killed ends")


def merged(record: dict | None, results: Path) -> dict | None:
    """The record with a further file's benchmarks; the same where that has none."""
    text = results.read_text() if results.exists() else ""
    if not text:
        return record
    more = json.loads(text)
    return more if record is None else {**record, "benchmarks": record["benchmarks"] + more["benchmarks"]}


if __name__ == "__main__":
    sys.exit(main())
