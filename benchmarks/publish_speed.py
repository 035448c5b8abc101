"""Put what `speed.py` and `resident.py` found where people read it: docs/performance.md and its figure.

    .venv/bin/python benchmarks/speed.py --out result.json
    .venv/bin/python benchmarks/publish_speed.py result.json

Keeps the result in ``benchmarks/results/speed.json`` and makes both from that file and ``resident.json`` beside it.
Without a new result, makes them again. A test holds the page against the files.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from prefixkit.errors import PrefixkitError
from prefixkit.files import read_json, write_json, write_text
from prefixkit.lab.facts import format_bytes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RESULT, RESIDENT = RESULTS / "speed.json", RESULTS / "resident.json"
PAGE, FIGURE = ROOT / "docs" / "performance.md", ROOT / "docs" / "results" / "speed.svg"
SUITES = {
    "training": "Training steps",
    "length": "Length of the prefix",
    "depth": "Depth of the MLP",
    "generation": "Generation",
}
NAMES = {
    "prefixkit": "prefixkit's prefix", "peft-prefix": "PEFT's prefix", "peft-projected": "PEFT's prefix behind its MLP",
    "lora": "PEFT's LoRA", "full": "full fine-tuning", "floor": "the matrix products alone",
    "base": "no prefix", "prefix": "one prefix for all rows", "mixed": "four prefixes, one per row",
    "longer": "no prefix, a prompt longer by 20 tokens",
}  # fmt: skip
PAGE_TEXT = """\
# Performance

Made by `benchmarks/publish_speed.py` from [a result file](../benchmarks/results/speed.json); do not edit it by hand.
[How it is measured](../benchmarks/README.md#speed-and-memory-beside-peft).

{machine}

{note}

![Time and memory of a training step beside prefixkit's](results/speed.svg)

{tables}

## Many prefixes beside one model

[Measured](../benchmarks/resident.py) on {resident_machine}: prefixes of {virtual_tokens} virtual
tokens, {prefixes:,} of them in memory, {resident:,} to choose among; medians of {times}, lowest and highest tenth in
brackets.

{resident_table}
"""
ACTIONS = {
    "load_ms": "loading one, with all checks",
    "switch_ms": "switching to another",
    "switch_8_rows_ms": "switching to eight others, one per row",
    "attach_and_detach_ms": "attaching one to a model with nothing attached, and detaching it",
    "bytes_per_tensor_byte": "memory per byte of tensors",
}
NOTE = {
    "float32": "This processor has no bfloat16 of its own, so everything ran in float32, where matrix products take "
    "most of a step, whoever computes it: nobody can be faster than the last row of the first table.",
    "bfloat16": "The processor multiplies bfloat16 itself.",
}

Json = Mapping[str, Any]


def render(result: Json, resident: Json) -> str:
    """Return the page."""
    machine, versions = result["machine"], result["machine"]["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return PAGE_TEXT.format(
        machine=f"{machine['cores']} cores of {machine['cpu']}, {result['dtype']}, {packages}, peft {result['peft']}; "
        f"the recipe `{result['recipe']['name']}`, medians of {result['rounds']} alternating rounds, lowest and "
        "highest in brackets.",
        note=NOTE[result["dtype"]],
        tables="\n\n".join(
            _table(title, result["suites"][name]) for name, title in SUITES.items() if name in result["suites"]
        ),
        resident_machine=f"{resident['machine']['cores']} cores of {resident['machine']['cpu']}, one thread",
        virtual_tokens=resident["num_virtual_tokens"],
        prefixes=resident["prefixes"],
        resident=resident["resident"],
        times=resident["times"],
        resident_table=_resident_table(resident),
    )


def _resident_table(resident: Json) -> str:
    goals = {goal["what"]: goal for goal in resident["goals"]}
    lines = ["| | came out as | goal at most | |", "|---|---|---|---|"]
    for key, name in ACTIONS.items():
        found = resident["measured"][key]
        is_timed = isinstance(found, Mapping)
        value = f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}] ms" if is_timed else f"{found:.2f}"
        goal = goals.get(key)
        mark = "" if goal is None else "met" if goal["is_met"] else "**missed**"
        most = "" if goal is None else f"{goal['most']:g} ms" if is_timed else f"{goal['most']:.2f}"
        lines.append(f"| {name} | {value} | {most} | {mark} |")
    return "\n".join(lines)


def _table(title: str, suite: Json) -> str:
    first = next(iter(suite["contestants"]))
    lines = [
        f"## {title}",
        "",
        f"| | tokens per second | time per token beside {NAMES.get(first, first)} | peak memory | beside it |",
        "|---|---|---|---|---|",
    ]
    for name, row in suite["contestants"].items():
        time = row["time_beside_first"]
        lines.append(
            f"| {NAMES.get(name, name)} | {row['tokens_per_second']:,.0f} | {time['median']:.2f} "
            f"[{time['low']:.2f}, {time['high']:.2f}] | {format_bytes(row['peak_bytes'])} | "
            f"{row['memory_beside_first']:.2f} |"
        )
    if suite["goals"]:
        lines += ["", "| goal | at most | came out as | |", "|---|---|---|---|"]
    for goal in suite["goals"]:
        mark = "met" if goal["is_met"] else "**missed**"
        lines.append(f"| {goal['what']} | {goal['most']:.2f} | {goal['ratio']['median']:.2f} | {mark} |")
    return "\n".join(lines)


def draw(result: Json, path: Path) -> None:
    """Draw time and memory of every way to train, beside prefixkit's."""
    rows = result["suites"]["training"]["contestants"]
    names = list(rows)[::-1]
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "path",
             "svg.hashsalt": "speed"}  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(9.6, 3.2), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, sharey=True)
        colours = ["#0072b2" if name == "prefixkit" else "#6f6a76" for name in names]
        times = [rows[name]["time_beside_first"] for name in names]
        medians = [time["median"] for time in times]
        ends = [[m - t["low"] for m, t in zip(medians, times, strict=True)],
                [t["high"] - m for m, t in zip(medians, times, strict=True)]]  # fmt: skip
        left.barh([NAMES[name] for name in names], medians, color=colours, xerr=ends)
        left.set(title="Time per token, prefixkit's = 1", xlim=(0, None))
        right.barh([NAMES[name] for name in names], [rows[name]["peak_bytes"] / 1e9 for name in names], color=colours)
        right.set(title="Peak memory, GB", xlim=(0, None))
        FigureCanvasSVG(figure)
        figure.savefig(path, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=RESULT, help="what speed.py wrote")
    result = read_json(parser.parse_args().result)
    write_json(RESULT, result)
    draw(result, FIGURE)
    write_text(PAGE, render(result, read_json(RESIDENT)))


if __name__ == "__main__":
    try:
        main()
    except PrefixkitError as error:
        sys.exit(str(error))
