"""One table at the end of the run: each case with its rivals, and geometric means over the cases."""

import math
import platform
import statistics
import subprocess
from pathlib import Path

import pytest
import torch

from kdfast._native import build_info


def pytest_configure(config):
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    command, here = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
    try:
        git = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except OSError:  # no git here; an error would cost the results
        return "unknown"
    return git.stdout.strip() or "unknown"


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(
        processor=processor(), system=platform.platform(), python=platform.python_version(), torch=torch.__version__,
        threads=torch.get_num_threads(), vector_unit=build_info.get("vector_unit"), commit=commit(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )  # fmt: skip


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info["id"] = commit()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    groups: dict[tuple, dict] = {}
    for bench in session.benchmarks:
        info = bench.extra_info
        if "impl" in info:
            key = (info["op"], info["case"], info["dtype"], info["device"])
            groups.setdefault(key, {})[info["impl"]] = (statistics.median(bench.stats.data), info)
    for op in sorted({key[0] for key in groups}):
        group = {key: found for key, found in groups.items() if key[0] == op}
        (steps if op == "meta_step" else table)(terminalreporter, op, group)


def steps(reporter, op: str, groups: dict) -> None:
    """Whole training steps: each with its time over the papers', the plain one's and the floor, and its error."""
    rows = [(name, *found) for group in groups.values() for name, found in group.items()]
    threads = rows[0][2]["threads"]
    reporter.section(f"{op}: medians of interleaved rounds, {threads} threads, torch {torch.__version__}")
    reporter.write_line(
        f"{'':>18} {'ms':>8} {'/ paper':>8} {'/ plain':>8} {'x floor':>8}  error (pathways, temperatures)"
    )
    for name, median, info in rows:
        errors = info["errors"] and "{:.1e} ({:.1e}, {:.1e})".format(*info["errors"])
        reporter.write_line(
            f"{name:>18} {median * 1e3:8.0f} {info['times_paper']:8.3f} {info['times_plain_kd']:8.2f} "
            f"{info['times_floor']:8.2f}  {errors or ''}"
        )


def speeds(reporter, op: str, groups: dict) -> None:
    """Of what has no rival but each other: images a second, and against the baseline."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    reporter.section(f"{op}: images/s, medians of interleaved rounds (x torchvision), torch {torch.__version__}")
    reporter.write_line(f"{'case':>34} {'device':>6}" + "".join(f"{name:>22}" for name in names))
    for (_, case, _, device), group in groups.items():
        speed = {name: info["images"] / seconds for name, (seconds, info) in group.items()}
        line = f"{case:>34} {device:>6}"
        for name in names:
            text = f"{speed[name]:,.0f} ({speed[name] / speed['torchvision']:.2f}x)" if name in speed else ""
            line += f"{text:>22}"
        reporter.write_line(line)


def table(reporter, op: str, groups: dict) -> None:
    if all("images" in info for group in groups.values() for _, info in group.values()):
        speeds(reporter, op, groups)
        return
    rivals = [name for name in dict.fromkeys(n for g in groups.values() for n in g) if name != "kdfast"]
    reporter.section(
        f"{op}: medians of interleaved rounds, {torch.get_num_threads()} thread, torch {torch.__version__}"
    )
    head = f"{'case':>22} {'dtype':>9} {'device':>6} {'ms':>9} {'GB/s':>7} {'% copy':>7} {'x floor':>7}"
    reporter.write_line(head + "".join(f"{'vs ' + name:>13}" for name in rivals))
    ratios = {name: [] for name in rivals}
    for (_, case, dtype, device), group in groups.items():
        if "kdfast" not in group:
            continue
        ours, info = group["kdfast"]
        line = f"{case:>22} {dtype:>9} {device:>6} {ours * 1e3:9.3f} {info['bytes'] / ours / 1e9:7.1f} "
        line += f"{info['percent_of_copy']:6.0f}% {info['times_exp_pass']:7.2f}"
        for name in rivals:
            if name in group:
                ratios[name].append(group[name][0] / ours)
                line += f"{ratios[name][-1]:12.2f}x"
            else:
                line += f"{'':>13}"
        reporter.write_line(line)
    means = [f"{name} {math.exp(statistics.fmean(map(math.log, r))):.2f}x" for name, r in ratios.items() if r]
    floor = [group["kdfast"][1]["times_exp_pass"] for group in groups.values() if "kdfast" in group]
    means.append(f"x floor {math.exp(statistics.fmean(map(math.log, floor))):.2f}")
    reporter.write_line(f"geometric means: {', '.join(means)}")
    reporter.write_line(
        "% copy: bytes of the op over its time, against a measured copy's speed; x floor: its time over a bare"
    )
    reporter.write_line("pass over the same data: an exponential of each logit, for pathways a copy.")
