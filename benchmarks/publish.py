"""Put measured numbers where people read them: result files into docs/results, a figure and tables into README.

    .venv/bin/python benchmarks/publish.py runs/positive-reviews

Copies the run's own files (of the samples the first rows, nobody picks them), draws ``overview.svg`` from them and from
``benchmarks/results/quality_vs_peft.json``, and rewrites what stands between README's ``results`` marks, in each of its
languages. A test (`tests/test_results.py`) holds them against the committed files.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from prefixkit.errors import PrefixkitError
from prefixkit.files import read_json, write_text
from prefixkit.lab.pages.comparison import REAL, compare
from prefixkit.lab.pages.facts import format_bytes, format_duration
from prefixkit.lab.run.folder import METRICS, RUN, SAMPLES, SCORES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
QUALITY, UNSEEN = (ROOT / "benchmarks" / "results" / f"quality_{name}.json" for name in ("vs_peft", "unseen"))
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
SHOWN_SAMPLES = 12
COLUMNS = {"base": "base model", "instruction": "with an instruction", "prefix": "prefix", REAL: "people"}
KEYS = (
    "heldout_nll",
    "steering",
    "sentiment_accuracy",
    "fluency_ppl",
    "repetition",
    "distinct_2",
    "self_bleu",
    "novelty",
)
METHODS = {
    "prefixkit": "prefixkit's prefix", "lora": "PEFT's LoRA", "peft-prefix": "PEFT's prefix tuning",
    "base": "base model",
}  # fmt: skip
COLOURS = {"base": "#6f6a76", "instruction": "#c25400", "prefix": "#0072b2", REAL: "#00795a",
           "prefixkit": "#0072b2", "lora": "#c25400", "peft-prefix": "#8a5fb0"}  # fmt: skip

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Language:
    """What README's results say in a language, around the numbers."""

    readme: str
    columns: Mapping[str, str]
    methods: Mapping[str, str]
    run: str
    quality: str
    again: str
    """The comparison on rows that took no part in choosing."""
    between: str
    headings: str
    chosen: str
    """What is said of the time that choosing examples took."""
    measures: Mapping[str, str] | None = None
    """Names of measures; left out, those of the reports."""
    duration: tuple[tuple[str, str], ...] = ()
    """Words of a time, and what to put for them."""


ENGLISH = Language(
    readme="README.md",
    columns=COLUMNS,
    methods=METHODS,
    run="One run of `make demo` (recipe `{name}`, seed {seed}; {cores} cores, {cpu}, {dtype}): {numbers:,} numbers "
        "trained in {steps} steps and {trained}{chosen}, measured in {measured}, peak memory {memory}. 95% intervals "
        "in brackets; *people* are held-out reviews, cut to the length of the generated texts.",
    quality="The same number of parameters on the same batches ({steps} steps of {rows}, seed {seed}, {threads} "
            "thread{plural} of {cpu}, PEFT {peft}), each method at the best of its rates on validation rows "
            "([how](benchmarks/README.md)), on another choice of 128 held-out reviews than above. Which rows to learn "
            "from, for how many steps and the prefix's rate were chosen while looking at held-out texts, which favours "
            "the prefix: with 8% of the rows instead of 5.5% the two end level "
            "([every look](docs/adr/0010-learning-from-the-likeliest-rows.md)).",
    again="The same once more, at these rates and over the seeds {seeds}, on the {rows} test reviews that took no "
          "part in choosing ([how](benchmarks/README.md)): the prefix ends at {own:.3f} and LoRA at {lora:.3f}, "
          "a difference of {gap} (95% interval over the reviews; seed by seed {each}).",
    between="; ",
    headings="| | rates tried | best | held-out loss | prefixkit's prefix minus it |",
    chosen=" after {} of choosing examples",
)  # fmt: skip
CHINESE = Language(
    readme="README.zh-TW.md",
    columns={"base": "基礎模型", "instruction": "加上指令", "prefix": "前綴", REAL: "真人"},
    methods={
        "prefixkit": "prefixkit 的前綴", "lora": "PEFT 的 LoRA", "peft-prefix": "PEFT 的前綴微調", "base": "基礎模型",
    },
    run="`make demo` 的一次 run（配方 `{name}`，亂數種子 {seed}；{cores} 核心，{cpu}，{dtype}）：{steps} 步訓練 "
        "{numbers:,} 個數字，費時 {trained}{chosen}，評量費時 {measured}，記憶體尖峰 {memory}。"
        "方括號內是 95% 區間；「真人」是沒有拿來訓練的影評，截到與生成文字相同的長度。",
    quality="參數量相同、批次相同（{steps} 步，每步 {rows} 則，亂數種子 {seed}，{threads} 個執行緒，{cpu}，"
            "PEFT {peft}），各方法都取驗證資料上最好的學習率（[做法](benchmarks/README.md)）；"
            "這裡的 128 則保留影評與上表不是同一批。"
            "用哪些列、幾步、前綴的學習率，都是看過保留資料後才定的，對前綴有利："
            "列數取 8% 而不是 5.5% 時，兩者不分上下"
            "（[每次的嘗試](docs/adr/0010-learning-from-the-likeliest-rows.md)）。",
    again="用同樣的學習率，換亂數種子 {seeds}，在沒有參與這些選擇的 {rows} 則測試影評上再比一次"
          "（[做法](benchmarks/README.md)）："
          "前綴 {own:.3f}，LoRA {lora:.3f}，相差 {gap}（對影評取的 95% 區間；各種子分別是 {each}）。",
    between="；",
    headings="| | 試過的學習率 | 最好的 | 保留資料損失 | prefixkit 的前綴減去它 |",
    chosen="（之前挑選例子 {}）",
    measures={
        "heldout_nll": "保留資料損失", "steering": "引導力道", "sentiment_accuracy": "評審判為符合",
        "fluency_ppl": "流暢度", "repetition": "重複", "distinct_2": "相異詞對", "self_bleu": "Self-BLEU",
        "novelty": "新穎度",
    },
    duration=(("min", "分"), ("s", "秒"), ("h", "小時")),
)  # fmt: skip
LANGUAGES = (ENGLISH, CHINESE)


def copy_run(run: Path, target: Path) -> None:
    """Copy what a run left, with the samples of the first rows only."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (RUN, SCORES, METRICS):
        shutil.copyfile(run / name, target / name)
    lines = (run / SAMPLES).read_text(encoding="utf-8").split("\n")
    kept = [line for line in lines if line and json.loads(line)["index"] < SHOWN_SAMPLES]
    write_text(target / SAMPLES, "".join(line + "\n" for line in kept))


def readme_block(run: Json, scores: Json, quality: Json, unseen: Json, language: Language = ENGLISH) -> str:
    """Return what README says between its marks."""
    lines = [*_run_lines(run, scores, language), "", *_quality_lines(quality, language), "", _again(unseen, language)]
    return "\n".join([BEGIN, "", *lines, "", END])


def _run_lines(run: Json, scores: Json, language: Language) -> list[str]:
    machine, chosen = run["machine"], run.get("choosing_seconds")
    lines = [
        language.run.format(
            name=run["name"], seed=run["seed"], cores=machine["cores"], cpu=machine["cpu"], dtype=run["base"]["dtype"],
            numbers=run["trainable_parameters"], steps=run["steps"], trained=_duration(run["seconds"], language),
            chosen="" if chosen is None else language.chosen.format(_duration(chosen, language)),
            measured=_duration(run["evaluation_seconds"], language), memory=format_bytes(run["peak_memory_bytes"]),
        ),
        "",
        "| | " + " | ".join(language.columns.values()) + " |",
        "|---|" + "---|" * len(language.columns),
    ]  # fmt: skip
    rows = {row.measure.key: row for row in compare(scores)}
    for key in KEYS:
        cells = [rows[key].cells.get(column) for column in language.columns]
        texts = [
            "" if cell is None else f"{cell.text} [{cell.interval_text}]" if cell.interval else cell.text
            for cell in cells
        ]
        label = rows[key].measure.label if language.measures is None else language.measures[key]
        lines.append(f"| {label} | " + " | ".join(texts) + " |")
    return lines


def _duration(seconds: float, language: Language) -> str:
    words = dict(language.duration)
    return " ".join(words.get(word, word) for word in format_duration(seconds).split(" "))


def _again(unseen: Json, language: Language) -> str:
    """Return what came out on rows that took no part in choosing."""

    def gap(found: Json) -> str:
        return f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"

    return language.again.format(
        rows=unseen["data"]["rows"], seeds=", ".join(map(str, unseen["seeds"])), own=unseen["test_loss"]["prefixkit"],
        lora=unseen["test_loss"]["lora"], gap=gap(unseen["difference"]),
        each=language.between.join(map(gap, unseen["by_seed"])),
    )  # fmt: skip


def _quality_lines(quality: Json, language: Language) -> list[str]:
    train, threads = quality["recipe"]["train"], quality["threads"]
    lines = [
        language.quality.format(
            steps=train["steps"], rows=train["batch_size"], seed=train["seed"], threads=threads,
            plural="s" if threads > 1 else "", cpu=quality["machine"]["cpu"], peft=quality["peft"],
        ),
        "",
        language.headings,
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for method, name in language.methods.items():
        rates = sorted(trial["learning_rate"] for trial in quality["trials"] if trial["method"] == method)
        found = quality["base"] if method == "base" else quality["best"].get(method)
        if found is None:  # not run, or diverged at every rate
            continue
        gap = quality["differences"].get(f"prefixkit - {method}")
        lines.append(
            f"| {name} | {', '.join(f'{rate:g}' for rate in rates)} | {found.get('learning_rate', '')} | "
            f"{found['test_loss']:.3f} | "
            + (f"{gap['difference']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]" if gap else "")
            + " |"
        )
    return lines


def draw_overview(scores: Json, quality: Json, path: Path) -> None:
    """Draw the two pictures of README: how methods learn, and what systems write."""
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "path",
             "svg.hashsalt": "overview"}  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(9.6, 3.5), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _draw_curves(left, quality)
        _draw_shares(right, scores)
        FigureCanvasSVG(figure)
        figure.savefig(path, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))


def _draw_curves(axes: Axes, quality: Json) -> None:
    """Draw each method's curve; one that never comes into view is only named, with where it ends."""
    top = quality["base"]["test_loss"] + 0.1
    for method, best in quality["best"].items():
        rate = best["learning_rate"]
        trial = next(t for t in quality["trials"] if (t["method"], t["learning_rate"]) == (method, rate))
        steps, losses = zip(*((p["step"], p["validation_loss"]) for p in trial["curve"]), strict=True)
        note = f" (above, ends at {losses[-1]:.2f})" if min(losses) > top else ""
        axes.plot(steps, losses, marker="o", markersize=4, color=COLOURS[method], label=METHODS[method] + note)
    axes.set(title="Validation loss while training", xlabel="step", ylabel="nats per token", ylim=(None, top))
    axes.legend(frameon=False)


def _draw_shares(axes: Axes, scores: Json) -> None:
    rows = {row.measure.key: row for row in compare(scores)}
    cells = rows["sentiment_accuracy"].cells
    for place, (column, name) in enumerate(reversed(COLUMNS.items())):
        cell = cells[column]
        assert cell.interval is not None
        axes.plot([100 * end for end in cell.interval], [place, place], color=COLOURS[column], linewidth=2)
        axes.plot([100 * cell.value], [place], "o", color=COLOURS[column])
        axes.annotate(cell.text, (100 * cell.value, place), xytext=(0, 7), textcoords="offset points", ha="center")
        axes.text(0, place, name, ha="left", va="center")
    axes.set(title="Texts that sound positive to the judge", xlabel="percent, with 95% intervals", xlim=(0, 104),
             ylim=(-0.6, 3.7), yticks=[])  # fmt: skip
    axes.spines["left"].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run folder")
    folder = parser.parse_args().run
    target = RESULTS / read_json(folder / RUN)["name"]
    copy_run(folder, target)
    run, scores, quality = read_json(target / RUN), read_json(target / SCORES), read_json(QUALITY)
    unseen = read_json(UNSEEN)
    draw_overview(scores, quality, RESULTS / "overview.svg")
    for language in LANGUAGES:
        readme = ROOT / language.readme
        before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        write_text(readme, before + readme_block(run, scores, quality, unseen, language) + after)


if __name__ == "__main__":
    try:
        main()
    except PrefixkitError as error:
        sys.exit(str(error))
