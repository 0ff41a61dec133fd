"""Tables in Markdown of files that `--benchmark-json` wrote, as docs/measured.md has them.

    python -m benchmarks.tables benchmarks/results/cpu-kd_kl.json ...

One an op and device, below a line that says where its numbers are from.
"""

import json
import statistics
import sys
from pathlib import Path


def groups(file: Path) -> dict[tuple[str, str], dict[tuple[str, str], dict[str, tuple[float, dict]]]]:
    """{(op, device): {(case, dtype): {implementation: (median seconds, extra_info)}}} in the file's order."""
    found: dict = {}
    for bench in json.loads(file.read_text())["benchmarks"]:
        info = bench["extra_info"]
        cases = found.setdefault((info["op"], info["device"]), {})
        cases.setdefault((info["case"], info["dtype"]), {})[info["impl"]] = (bench["stats"]["median"], info)
    return found


def origin(file: Path) -> str:
    """Where the file's numbers are from, in a line."""
    machine = json.loads(file.read_text())["machine_info"]
    unit = f", {machine['vector_unit']}" if machine.get("vector_unit") else ""
    where = machine["gpu"] or f"{machine['processor']}{unit}"
    return f"{where}, torch {machine['torch']}, Python {machine['python']}, commit {machine['commit']}"


def markdown(head: list[str], lines: list[list[str]], words: int) -> str:
    """A table whose first `words` columns are words and whose others are numbers."""
    rule = ["---" if i < words else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def ratios(cases: dict, rival: str) -> list[float]:
    """The rival's time over kdfast's, case by case."""
    return [group[rival][0] / group["kdfast"][0] for group in cases.values() if rival in group]


def kernels(cases: dict) -> str:
    """Milliseconds, GB/s and % of a copy of kdfast's op; its time over the floor's; rivals' times over its time."""
    rivals = list(dict.fromkeys(name for group in cases.values() for name in group if name != "kdfast"))
    lines = []
    for (case, dtype), group in cases.items():
        seconds, info = group["kdfast"]
        line = [case.replace("x", " × ").replace("+", " + "), dtype, f"{1e3 * seconds:.3f}"]
        line += [
            f"{info['bytes'] / seconds / 1e9:.1f}",
            f"{info['percent_of_copy']:.0f}",
            f"{info['times_exp_pass']:.2f}",
        ]
        for name in rivals:
            there = name in group
            line += [f"{1e3 * group[name][0]:.3f}", f"{group[name][0] / seconds:.2f}"] if there else ["–", "–"]
        lines.append(line)
    head = ["case", "dtype", "kdfast ms", "GB/s", "% of copy", "× floor"]
    head += [text for name in rivals for text in (f"{name} ms", f"× {name}")]
    means = [f"{statistics.geometric_mean(ratios(cases, name)):.2f} × {name}" for name in rivals]
    floor = statistics.geometric_mean(group["kdfast"][1]["times_exp_pass"] for group in cases.values())
    return f"{markdown(head, lines, 2)}\n\nGeometric means: {', '.join(means)}, {floor:.2f} × the floor."


def steps(cases: dict) -> str:
    """Whole training steps: each over the papers', the plain one and the floor, and its meta-gradient's error."""
    lines = []
    for name, (seconds, info) in (item for group in cases.values() for item in group.items()):
        errors = info["errors"] or []
        outside = info.get("outside_student")
        lines.append([
            name, f"{1e3 * seconds:.0f}", f"{info['times_paper']:.3f}", f"{info['times_plain_kd']:.2f}",
            f"{info['times_floor']:.2f}", *(f"{100 * error:.2g} %" for error in errors), *["–"] * (3 - len(errors)),
            *([f"{100 * outside:.0f} %"] if outside is not None else []),
        ])  # fmt: skip
    head = ["step", "ms", "/ paper", "/ plain-kd", "× floor", "error", "weights", "temperatures"]
    return markdown(head + ["outside the student"] * (len(lines[0]) - len(head)), lines, 1)


def speeds(cases: dict) -> str:
    """Images a second, and over those of an ordinary loader (`plain`)."""
    names = list(dict.fromkeys(name for group in cases.values() for name in group))
    lines = []
    for (case, _), group in cases.items():
        speed = {name: info["images"] / seconds for name, (seconds, info) in group.items()}
        cell = lambda name: f"{speed[name]:,.0f} ({speed[name] / speed['plain']:.1f} ×)"  # noqa: B023, E731
        lines.append([case, *(cell(name) if name in speed else "–" for name in names)])
    return markdown(["images/s (× plain)", *names], lines, 1)


def tables(file: Path) -> list[str]:
    """In the order of `groups`."""
    kinds = {"meta_step": steps, "data": speeds}
    return [kinds.get(op, kernels)(cases) for (op, _), cases in groups(file).items()]


def main():
    for name in sys.argv[1:]:
        file = Path(name)
        for (op, device), text in zip(groups(file), tables(file), strict=True):
            print(f"`{op}` on {device}: {origin(file)} (`{file.name}`)\n\n{text}\n")


if __name__ == "__main__":
    main()
