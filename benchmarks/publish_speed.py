"""Put what `speed.py`, `curves.py`, `resident.py` and `padding.py` found where people read it: docs/performance.md.

    .venv/bin/python benchmarks/speed.py --out result.json
    .venv/bin/python benchmarks/publish_speed.py result.json

Keeps the result in ``benchmarks/results/speed.json`` and makes the page, its figures and README's table of goals from
that file and the others' beside it. Without a new result, makes them again. A test holds them against the files.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from prefixkit.errors import PrefixkitError
from prefixkit.files import read_json, write_json, write_text
from prefixkit.lab.pages.comparison import Unit, format_value
from prefixkit.lab.pages.facts import format_bytes
from time_to_quality import QUALITY, Race, races

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RESULT, RESIDENT = RESULTS / "speed.json", RESULTS / "resident.json"
CURVES, PADDING, COMPILING, ATTENTION = (
    RESULTS / f"{name}.json" for name in ("curves", "padding", "compiling", "attention")
)
PAGE = ROOT / "docs" / "performance.md"
FIGURE, CURVES_FIGURE = ROOT / "docs" / "results" / "speed.svg", ROOT / "docs" / "results" / "curves.svg"
SUITES = {
    "training": "Training steps",
    "length": "Length of the prefix",
    "depth": "Depth of the MLP",
    "generation": "Generation",
}
NAMES = {
    "prefixkit": "prefixkit's prefix", "giving-back": "the same, memory given back to the system",
    "peft-prefix": "PEFT's prefix", "peft-projected": "PEFT's prefix behind its MLP",
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

## Time to quality

How soon prefixkit is where its rivals end: [computed](../benchmarks/time_to_quality.py) from the loss curves of
[250 steps on all rows](results/all-rows/quality_vs_peft.json), trained in {quality_dtype} on {quality_machine}, with a
validation loss every 50 steps, and the times per step above. PEFT's prefix starts as PEFT starts it, from random
numbers. One that is given a text to start from, as prefixkit's is, was not raced, so how much is won here by the start
alone is not known; it is ahead of PEFT's examples before its first step, whatever a step takes.

{races_table}

## Cost against work

[Measured](../benchmarks/curves.py) on {curves_machine}: a training step of {rows} texts of {text} tokens behind
{curves_tokens} virtual tokens, of which one thing grows (models of other sizes: {model_rows} texts of {model_text}
tokens); medians of {curves_rounds} rounds in which the points of a curve take turns.

![Time against length of prefix, of text, rows, size of the model and number of prefixes](results/curves.svg)

{curves_table}

An exponent of 1 is a cost in proportion. Switching was timed here with all threads, and before a model came to be
looked at more quickly; the last table of this page was timed after. What a backward pass keeps is counted, not
measured. The models of several sizes have random weights.

## Memory that is let go

Where the C library is glibc, runs keep the memory of a tensor that is let go for the next one, instead of giving it
back to the system and having it cleared page by page. Setting `MALLOC_TRIM_THRESHOLD_=131072`, its own value, leaves
glibc as it is. {keeping}

## Why layers are not compiled

[Measured](../benchmarks/compiling.py) on {compiling_machine}: of a training step, {products:.0%} is matrix products,
{attention:.0%} attention, and {rest:.0%} everything else, which is all that fusing could save from. `torch.compile` of
the {parts} MLPs and norms, their shapes left open, takes {first:.0f} s with an empty cache and {again:.1f} s with a
full one, and then a step takes {compiled:.2f} [{compiled_low:.2f}, {compiled_high:.2f}] of its time before, the lowest
and highest of {compiling_rounds} rounds: no gain was found in {compiling_dtype}, and rounds differ by more than there
is to gain. Where matrix products are faster, in bfloat16 or on a GPU, the rest is more of a step; that was not
measured. A model that you compile yourself reads its prefix as any other ([conformance](conformance.md)).

## Which attention is faster

[Measured](../benchmarks/attention.py) on {attention_machine}: one layer's attention forwards and backwards, by torch's
fused kernel (sdpa, the default) and by the model's own matrix products (eager), which keep the scores of all pairs of
tokens in memory; medians of {attention_rounds} rounds, lowest and highest in brackets.

{attention_table}

Attention is {attention:.0%} of a step (above), so a third less of it is about {third:.0%} of a step.
`model.attention=fastest` times the two for a run's own shape before it trains, and trains with eager where that takes
less than 0.9 of the time; the choice is kept for `--resume` ([why](adr/0013-attention-chosen-by-measurement.md)).

## Padding, and why texts are not packed

Texts of similar length go into one batch (`train.group_by_length`), and what is left of padding is the most that
packing several texts into one row could save. [Counted](../benchmarks/padding.py) over two epochs, in the recipes'
batches; of the reviews, all clear rows:

{padding_table}

So training does not pack: with attention computed for whole rows, a packed row pays for the pairs of tokens of
different texts, which are then masked. Packed batches of your own, with positions that begin again at every text, are
read right, each text behind the prefix and none of them seeing another ([conformance](conformance.md), packed
documents).

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
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
_RACES = (
    "time to the loss of PEFT's prefix at its best rate",
    "time to the loss of PEFT's prefix at 0.01, its examples' rate",
)
#: What README's table says in each of its languages.
WORDS = {
    "README.md": {
        "cores": "cores of", "most": "goal, at most", "came": "came out as", "met": "met", "missed": "missed",
        "never": "never",
        "time per token beside PEFT's prefix": "training, time per token beside PEFT's prefix",
        "peak memory beside PEFT's prefix": "training, peak memory beside PEFT's prefix",
        "time per token beside the matrix products alone": "training, time per token beside the matrix products alone",
        "time of mixed rows beside one prefix": "generating, time of a prefix per row beside one for all",
        "time of a prefix beside a prompt as much longer": "generating, time of a prefix beside a prompt as long",
        _RACES[0]: "time to the loss of PEFT's prefix, started as PEFT starts it, at its best rate (curves: bfloat16, "
                   "another machine)",
        _RACES[1]: "the same at 0.01, the rate of PEFT's examples (a start from a text is there before its first step)",
        ACTIONS["load_ms"]: "loading a prefix, all checks included (one thread)",
        ACTIONS["switch_ms"]: "switching to another prefix (one thread)",
        ACTIONS["bytes_per_tensor_byte"]: "memory of 10,000 prefixes per byte of their tensors",
    },
    "README.zh-TW.md": {
        "cores": "核心", "most": "目標（上限）", "came": "結果", "met": "達到", "missed": "未達到", "never": "從未",
        "time per token beside PEFT's prefix": "訓練每個 token 的時間，與 PEFT 的前綴相比",
        "peak memory beside PEFT's prefix": "訓練的記憶體尖峰，與 PEFT 的前綴相比",
        "time per token beside the matrix products alone": "訓練每個 token 的時間，與單純矩陣乘法相比",
        "time of mixed rows beside one prefix": "生成：每列不同前綴的時間，與單一前綴相比",
        "time of a prefix beside a prompt as much longer": "生成：前綴的時間，與同樣長的提示相比",
        _RACES[0]: "到達 PEFT 前綴（PEFT 自己的起點，最好的學習率）損失的時間（曲線：bfloat16，另一台機器）",
        _RACES[1]: "同上，但學習率為其範例的 0.01（從文字起步，第一步之前就已到達）",
        ACTIONS["load_ms"]: "載入一個前綴，含所有檢查（一個執行緒）",
        ACTIONS["switch_ms"]: "切換到另一個前綴（一個執行緒）",
        ACTIONS["bytes_per_tensor_byte"]: "記憶體與張量本身大小之比",
    },
}  # fmt: skip
NOTE = {
    "float32": "This processor has no bfloat16 of its own, so everything timed here ran in float32, where matrix "
    "products take most of a step, whoever computes it: nobody can be faster than the last row of the first table.",
    "bfloat16": "The processor multiplies bfloat16 itself.",
}

#: Up to here an axis has a tick for each of its points.
_MOST_WRITTEN_OUT = 1000

Json = Mapping[str, Any]


def render(
    result: Json, resident: Json, curves: Json, padding: Json, quality: Json, compiling: Json, attention: Json
) -> str:
    """Return the page."""
    machine, versions = result["machine"], result["machine"]["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return PAGE_TEXT.format(
        machine=f"{machine['cores']} cores of {machine['cpu']}, {result['dtype']}, {packages}, peft {result['peft']}; "
        f"the recipe `{result['recipe']['name']}` on all its clear rows, medians of {result['rounds']} alternating "
        "rounds, lowest and highest in brackets.",
        note=NOTE[result["dtype"]],
        tables="\n\n".join(
            _table(title, result["suites"][name]) for name, title in SUITES.items() if name in result["suites"]
        ),
        races_table=_races_table(races(quality, result)),
        quality_machine=f"{quality['machine']['cores']} cores of {quality['machine']['cpu']}",
        quality_dtype=quality["base"]["dtype"],
        curves_machine=f"{curves['machine']['cores']} cores of {curves['machine']['cpu']}, {curves['dtype']}",
        rows=curves["work"]["rows"],
        text=curves["work"]["text"],
        model_rows=curves["model_work"]["rows"],
        model_text=curves["model_work"]["text"],
        curves_tokens=curves["work"]["virtual_tokens"],
        curves_rounds=curves["rounds"],
        curves_table=_curves_table(curves),
        keeping=_keeping(result["suites"]["training"]["contestants"]),
        compiling_machine=f"{compiling['machine']['cores']} cores of {compiling['machine']['cpu']}",
        compiling_dtype=compiling["dtype"],
        compiling_rounds=compiling["rounds"],
        products=compiling["spent"]["matrix products"],
        attention=compiling["spent"]["attention"],
        third=compiling["spent"]["attention"] / 3,
        rest=compiling["spent"]["everything else"],
        parts=compiling["parts"],
        first=compiling["seconds_to_compile"]["first"],
        again=compiling["seconds_to_compile"]["again"],
        compiled=compiling["time_beside_plain"]["median"],
        compiled_low=compiling["time_beside_plain"]["low"],
        compiled_high=compiling["time_beside_plain"]["high"],
        attention_machine=f"{attention['machine']['cores']} cores of {attention['machine']['cpu']}",
        attention_rounds=attention["rounds"],
        attention_table=_attention_table(attention),
        padding_table=_padding_table(padding),
        resident_machine=f"{resident['machine']['cores']} cores of {resident['machine']['cpu']}, one thread",
        virtual_tokens=resident["num_virtual_tokens"],
        prefixes=resident["prefixes"],
        resident=resident["resident"],
        times=resident["times"],
        resident_table=_resident_table(resident),
    )


def readme_table(result: Json, resident: Json, quality: Json, language: str = "README.md") -> str:
    """Return what README says between its marks: every goal, and what it came out as."""
    words = WORDS[language]
    machine = f"{result['machine']['cores']} {words['cores']} {result['machine']['cpu']}, {result['dtype']}"
    lines = [BEGIN, "", f"| {machine} | {words['most']} | {words['came']} | |", "|---|---|---|---|"]
    rows = [
        (goal["what"], f"{goal['most']:.2f}", f"{goal['ratio']['median']:.2f}", goal["is_met"])
        for suite in result["suites"].values()
        for goal in suite["goals"]
    ]
    for race in races(quality, result):
        if race.most is not None:
            time = words["never"] if race.time is None else f"{race.time:.2f}"
            rows.append((f"time to the loss of {race.what}", f"{race.most:.2f}", time, race.is_met))
    for goal in resident["goals"]:
        found = resident["measured"][goal["what"]]
        value, unit = (found["median"], " ms") if isinstance(found, Mapping) else (found, "")
        rows.append((ACTIONS[goal["what"]], f"{goal['most']:.2f}{unit}", f"{value:.2f}{unit}", goal["is_met"]))
    for what, most, came, is_met in rows:
        mark = words["met"] if is_met else f"**{words['missed']}**"
        lines.append(f"| {words[what]} | {most} | {came} | {mark} |")
    return "\n".join([*lines, "", END])


def _keeping(contestants: Json) -> str:
    if "giving-back" not in contestants:
        return "The tables above were measured before, with memory given back."
    time = contestants["giving-back"]["time_beside_first"]
    return (
        f"Given back, a training step takes {time['median']:.2f} [{time['low']:.2f}, {time['high']:.2f}] times as long "
        "(the first table)."
    )


def _races_table(found: list[Race]) -> str:
    head = ("loss of", "nats", "its steps", "prefixkit's steps", "time beside it", "goal at most", "")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for race in found:
        own = "never" if race.own is None else race.own
        time = "" if race.time is None else f"{race.time:.2f}"
        mark = "" if race.most is None else "met" if race.is_met else "**missed**"
        most = "" if race.most is None else f"{race.most:.2f}"
        lines.append(f"| {race.what} | {race.loss:.3f} | {race.rival} | {own} | {time} | {most} | {mark} |")
    return "\n".join(lines)


def _curves_table(curves: Json) -> str:
    lines = [
        "| what grows | from, to | time | slope of the time | slope of what is kept |",
        "|---|---|---|---|---|",
    ]
    for curve in curves["curves"].values():
        points = curve["points"]
        first, last = points[0], points[-1]
        ends = " to ".join(f"{point['x']:,.0f}" for point in (first, last))
        times = " to ".join(format_value(point["seconds"]["median"], Unit.SECONDS) for point in (first, last))
        slopes = [_slope(curve[key], is_power=curve["is_power"]) for key in ("fit", "kept") if curve[key]]
        lines.append(f"| {curve['x']}, {curve['what']} | {ends} | {times} | {slopes[0]} | {' '.join(slopes[1:])} |")
    return "\n".join(lines)


def _slope(fit: Json, *, is_power: bool) -> str:
    """Write an exponent, or what each further unit adds in percent, with its interval."""
    if is_power:
        return f"exponent {fit['slope']:.2f} [{fit['low']:.2f}, {fit['high']:.2f}]"
    return f"{100 * fit['slope']:.3f}% [{100 * fit['low']:.3f}%, {100 * fit['high']:.3f}%] each"


def _attention_table(attention: Json) -> str:
    lines = [
        "| number format | rows | tokens | virtual tokens | sdpa | eager | eager beside sdpa |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in attention["measured"]:
        times = [f"{each['seconds'][name]['median'] * 1000:.1f} ms" for name in ("sdpa", "eager")]
        ratio = each["eager_beside_sdpa"]
        lines.append(
            f"| {each['dtype']} | {each['rows']} | {each['tokens']} | {each['virtual_tokens']} | {' | '.join(times)} "
            f"| {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] |"
        )
    return "\n".join(lines)


def _padding_table(padding: Json) -> str:
    lines = ["| task | texts | tokens each | padding | without grouping |", "|---|---|---|---|---|"]
    for name, task in padding["tasks"].items():
        shares = f"{task['grouped']:.1%} | {task['shuffled']:.1%}"
        lines.append(f"| {name} | {task['texts']:,} | {task['tokens']:.0f} | {shares} |")
    return "\n".join(lines)


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


def draw_curves(curves: Json, path: Path) -> None:
    """Draw every curve with the line that was fitted to it."""
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "path",
             "svg.hashsalt": "curves"}  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(9.6, 5.6), layout="constrained", facecolor="white")
        for axis, curve in zip(figure.subplots(2, 3).flat, curves["curves"].values(), strict=False):
            points, fit = curve["points"], curve["fit"]
            x, times = [point["x"] for point in points], [point["seconds"] for point in points]
            medians = [time["median"] for time in times]
            ends = [[t["median"] - t["low"] for t in times], [t["high"] - t["median"] for t in times]]
            axis.errorbar(x, medians, yerr=ends, fmt="o", color="#0072b2", markersize=4, capsize=2)
            if curve["is_power"]:
                axis.plot(x, [fit["start"] * value ** fit["slope"] for value in x], color="#6f6a76", linewidth=1)
                axis.set(xscale="log", yscale="log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                if max(x) < _MOST_WRITTEN_OUT:
                    axis.set_xticks(x, [f"{value:g}" for value in x])
                axis.xaxis.set_minor_formatter(NullFormatter())
                axis.yaxis.set_minor_formatter(NullFormatter())
            else:
                axis.plot(x, [fit["start"] * (1 + fit["slope"] * value) for value in x], color="#6f6a76", linewidth=1)
                axis.set(ylim=(0, None))
            axis.set(title=f"{curve['title']}: {curve['what']}", xlabel=curve["x"], ylabel="seconds")
            axis.title.set_fontsize(9)
        FigureCanvasSVG(figure)
        figure.savefig(path, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=RESULT, help="what speed.py wrote")
    result = read_json(parser.parse_args().result)
    write_json(RESULT, result)
    curves, resident, quality = read_json(CURVES), read_json(RESIDENT), read_json(QUALITY)
    draw(result, FIGURE)
    draw_curves(curves, CURVES_FIGURE)
    others = read_json(PADDING), quality, read_json(COMPILING), read_json(ATTENTION)
    write_text(PAGE, render(result, resident, curves, *others))
    for name in WORDS:
        before, _, rest = (ROOT / name).read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        write_text(ROOT / name, before + readme_table(result, resident, quality, name) + after)


if __name__ == "__main__":
    try:
        main()
    except PrefixkitError as error:
        sys.exit(str(error))
