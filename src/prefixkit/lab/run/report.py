"""The report of a run: one HTML page made from the run folder's files alone, readable without a network."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from markupsafe import Markup

from prefixkit.config import Format, MethodConfig
from prefixkit.errors import EvaluationError
from prefixkit.files import write_text
from prefixkit.lab.pages.comparison import REAL, SYSTEMS, ComparisonRow, compare, is_number
from prefixkit.lab.pages.facts import (
    Fact,
    Json,
    Writers,
    flat_facts,
    format_bytes,
    format_count,
    format_duration,
    named_facts,
    recipe_changes,
)
from prefixkit.lab.pages.plots import loss_plot, small_plot
from prefixkit.lab.pages.render import render_page
from prefixkit.lab.run.folder import METRICS, PREDICTIONS, REPORT, RUN, SAMPLES, SCORES
from prefixkit.lab.run.predictions import read_predictions

SHOWN_SAMPLES = 12
"""Rows of samples the report shows: the first ones, so that nobody picked them."""

_TRAINING: Writers = {
    "seed": ("seed", str),
    "steps": ("steps", format_count),
    "best_step": ("best step, kept", format_count),
    "tokens": ("tokens seen", format_count),
    "choosing_seconds": ("time to choose examples", format_duration),
    "seconds": ("time to train", format_duration),
    "evaluation_seconds": ("time to measure", format_duration),
    "tokens_per_second": ("tokens per second", format_count),
    "peak_memory_bytes": ("peak memory", format_bytes),
    "threads": ("threads", format_count),
    "rollbacks": ("rollbacks", format_count),
}
_BASE: Writers = {
    "id": ("base model", str),
    "revision": ("revision", str),
    "dtype": ("number format", str),
    "licence": ("its licence", str),
    "fingerprint": ("its fingerprint", str),
}
_HASHES: Writers = {"data_hash": ("data hash", str), "content_hash": ("prefix hash", str)}
_LICENCE: Writers = {"licence": ("terms", str)}


@dataclass(frozen=True)
class RunFiles:
    """What was found in a run folder; what is missing is empty."""

    run: Json
    metrics: Sequence[Json]
    scores: Json
    samples: Sequence[Json]
    predictions: Sequence[Json] = ()


@dataclass(frozen=True)
class Passage:
    """A piece of a text, and whether the training texts contain it word for word."""

    text: str
    is_copied: bool


@dataclass(frozen=True)
class Sample:
    """One generated text with the judge's verdict: "" where nothing was judged."""

    passages: Sequence[Passage]
    verdict: str
    is_wanted: bool


@dataclass(frozen=True)
class SampleRow:
    """What each system wrote for the same prompt, and what people did, if the prompt is an input to answer."""

    index: int
    prompt: str
    texts: Mapping[str, Sample]
    references: Sequence[str] = ()


@dataclass(frozen=True)
class Headline:
    """A big number and what it is to be read against."""

    title: str
    value: str
    others: Sequence[Fact]
    note: str


@dataclass(frozen=True)
class Plots:
    """Inline SVGs; None where the metrics hold nothing to draw."""

    loss: Markup | None
    loss_narrow: Markup | None
    small: Sequence[Markup]


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder, from the files in it and nothing else.

    A section whose file is absent is left out. The page needs no network and no scripts.

    Returns:
        The page's path.

    Raises:
        EvaluationError: the folder holds none of the files a report is made of, or one of them is damaged.
    """
    files = read_run(run_dir)
    path = run_dir / REPORT
    write_text(path, render(files, fallback_name=run_dir.resolve().name))
    return path


def read_run(run_dir: Path) -> RunFiles:
    """Read the files a report is made of.

    Raises:
        EvaluationError: none of them is there, or one is damaged.
    """
    names = (RUN, METRICS, SCORES, SAMPLES, PREDICTIONS)
    if not any((run_dir / name).is_file() for name in names):
        raise EvaluationError(f"{run_dir}: nothing to report; expected a run folder with {', '.join(names)}")
    run = _read_lines(run_dir / RUN, whole=True)
    scores = _read_lines(run_dir / SCORES, whole=True)
    metrics = {line["step"]: line for line in _read_lines(run_dir / METRICS) if "step" in line}
    return RunFiles(
        run=run[0] if run else {},
        # after a rollback a step has two lines: the last one holds
        metrics=[metrics[step] for step in sorted(metrics)],
        scores=scores[0] if scores else {},
        samples=_read_lines(run_dir / SAMPLES),
        predictions=_read_lines(run_dir / PREDICTIONS),
    )


def render(files: RunFiles, *, fallback_name: str) -> str:
    """Return the page; `fallback_name` titles a run that has no run.json."""
    run, recipe = files.run, files.run.get("recipe") or {}
    method = MethodConfig.model_validate(_section(recipe, "method")).title
    measured_with = _section(files.scores, "measured_with") or recipe
    label = _section(recipe, "data").get("keep_label")
    samples = sample_rows(files.samples, **({} if label is None else {"wanted": str(label)}))
    comparison = compare(files.scores)
    present = {system for row in comparison for system in row.cells} | {line["system"] for line in files.samples}
    hashes = run.get("base_weights_hash") or {}
    return render_page(
        "report.html",
        name=run.get("name") or fallback_name,
        description=run.get("description") or "",
        lead=_lead(run, method),
        method=method,
        headlines=headlines(files),
        plots=_plots(files),
        metrics=files.metrics,
        best_step=run.get("best_step"),
        rollbacks=run.get("rollbacks") or 0,
        comparison=comparison,
        systems=[system for system in SYSTEMS if system in present],
        columns=[column for column in (*SYSTEMS, REAL) if column in present],
        instruction=_section(measured_with, "evaluation").get("instruction"),
        judge=_judge(files.scores),
        samples=samples[:SHOWN_SAMPLES],
        num_samples=len(samples),
        predictions=read_predictions(files.predictions),
        changes=recipe_changes({**recipe, **measured_with}),
        training=named_facts(run, _TRAINING),
        data=flat_facts(run.get("data_counts") or {}),
        machine=flat_facts({k: v for k, v in (run.get("machine") or {}).items() if k != "versions"}),
        versions=flat_facts(run.get("versions") or {}),
        origin=named_facts(run.get("base") or {}, _BASE) + named_facts(run, _HASHES) + named_facts(recipe, _LICENCE),
        weights=hashes if hashes.get("before") and hashes.get("after") else None,
    )


def headlines(files: RunFiles) -> list[Headline]:
    """Return up to three big numbers, each with the values it is to be read against."""
    rows = {row.measure.key: row for row in compare(files.scores)}
    found = []
    if (row := rows.get("accuracy")) and "prefix" in row.cells:
        found.append(Headline("Accuracy", row.cells["prefix"].text, _others(row), "on texts nothing was trained on"))
    if (row := rows.get("heldout_nll")) and "prefix" in row.cells:
        found.append(
            Headline("Held-out loss", row.cells["prefix"].text, _others(row), f"{_unit(files)}; lower is better")
        )
    elif is_number(files.run.get("best_heldout_loss")):
        start = [
            Fact("before", f"{m['heldout_loss']:.3f}") for m in files.metrics[:1] if is_number(m.get("heldout_loss"))
        ]
        best = f"{files.run['best_heldout_loss']:.3f}"
        found.append(Headline("Validation loss", best, start, f"{_unit(files)}; lower is better"))
    if (row := rows.get("bleu")) and "prefix" in row.cells:
        found.append(Headline("BLEU", row.cells["prefix"].text, _others(row), "beside people; 100 is the same"))
    if (row := rows.get("sentiment_accuracy")) and "prefix" in row.cells:
        note = "of the generated texts, by a judge that saw none of the training rows"
        found.append(Headline("Judged as wanted", row.cells["prefix"].text, _others(row), note))
    if is_number(count := files.run.get("trainable_parameters", files.scores.get("trainable_parameters"))):
        size = files.run.get("materialised_bytes")
        others = [Fact("as a file", format_bytes(size))] if is_number(size) else []
        if is_number(tokens := files.run.get("num_virtual_tokens")):
            others.append(Fact("virtual tokens", f"{tokens:,}"))
        note = "every weight of the base model stayed as it was" if is_base_unchanged(files.run) else ""
        found.append(Headline("Numbers trained", f"{count:,}", others, note))
    return found


def is_base_unchanged(run: Json) -> bool:
    """Whether the run recorded the base weights' hash before and after training, and they are equal."""
    hashes = run.get("base_weights_hash") or {}
    return bool(hashes.get("before")) and hashes.get("before") == hashes.get("after")


def sample_rows(samples: Sequence[Json], *, wanted: str = "as wanted") -> list[SampleRow]:
    """Put the texts for the same prompt and index side by side, in the order of their index.

    Args:
        samples: lines of samples.jsonl.
        wanted: the label the prefix is meant to produce.
    """
    rows: dict[tuple[int, str], dict[str, Sample]] = {}
    references = {(line["index"], line["prompt"]): line.get("references") or () for line in samples}
    for line in samples:
        rows.setdefault((line["index"], line["prompt"]), {})[line["system"]] = Sample(
            passages=split_copied(line["text"], [(s["start"], s["end"]) for s in line.get("copied") or ()]),
            verdict=_verdict(line.get("is_wanted"), line.get("probability"), wanted),
            is_wanted=bool(line.get("is_wanted")),
        )
    return [SampleRow(*place, rows[place], references[place]) for place in sorted(rows)]


def _verdict(is_wanted: bool | None, probability: float | int | None, label: str) -> str:
    """Return the judge's words on a text, such as ``not positive 66%``."""
    if is_wanted is None:
        return ""
    words = label if is_wanted else f"not {label}"
    if probability == 0:  # of a text without a word the judge knows
        return "says nothing the judge knows"
    if probability is None:
        return words
    return f"{words} {probability if is_wanted else 1 - probability:.0%}"


def split_copied(text: str, spans: Sequence[Sequence[int]]) -> list[Passage]:
    """Cut a text at the ends of its copied spans; spans may overlap, touch, or reach over the end."""
    is_copied = [False] * len(text)
    for start, end in spans:
        for position in range(max(start, 0), min(end, len(text))):
            is_copied[position] = True
    cuts = [i for i in range(1, len(text)) if is_copied[i] != is_copied[i - 1]]
    bounds = [0, *cuts, len(text)]
    return [Passage(text[a:b], is_copied[a]) for a, b in pairwise(bounds) if a < b]


def _read_lines(path: Path, *, whole: bool = False) -> list[dict[str, Any]]:
    """Return the objects in a file: one per line, or the `whole` file as one; none where there is no file."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    pieces = [text] if whole else text.split("\n")  # not splitlines: JSON strings may hold U+2028
    objects = []
    for number, piece in enumerate(pieces, start=1):
        if not piece.strip():
            continue
        where = path if whole else f"{path}, line {number}"
        try:
            value = json.loads(piece)
        except json.JSONDecodeError:
            raise EvaluationError(f"{where}: not valid JSON; make it again with `prefixkit evaluate`") from None
        if not isinstance(value, dict):
            raise EvaluationError(f"{where}: expected a JSON object, got {type(value).__name__}")
        objects.append(value)
    return objects


def _plots(files: RunFiles) -> Plots:
    best = files.run.get("best_step")
    small = (
        small_plot(files.metrics, "learning_rate", "learning rate", name="rate"),
        small_plot(files.metrics, "method.learning_rate", "learning rate of the other method", name="method-rate"),
        small_plot(files.metrics, "head.learning_rate", "learning rate of the head", name="head-rate"),
        small_plot(files.metrics, "grad_norm", "gradient norm", name="norm"),
    )
    wide = loss_plot(files.metrics, name="loss", best_step=best, unit=_unit(files))
    narrow = loss_plot(files.metrics, name="loss-narrow", best_step=best, unit=_unit(files), width=4.1)
    # Markup: these SVGs are made here from numbers alone; nothing in them was typed by anyone.
    return Plots(
        Markup(wide) if wide else None,
        Markup(narrow) if narrow else None,
        [Markup(svg) for svg in small if svg],
    )


def _others(row: ComparisonRow) -> list[Fact]:
    return [Fact(system, row.cells[system].text) for system in (*SYSTEMS[1:], REAL) if system in row.cells]


def _unit(files: RunFiles) -> str:
    """Return what a loss is counted in."""
    kind = _section(files.run.get("recipe") or {}, "data").get("format", Format.TEXT)
    return "nats per label" if Format(kind).is_classified else "nats per token"


def _judge(scores: Json) -> Fact | None:
    if not is_number(accuracy := scores.get("judge_accuracy")):
        return None
    short = scores.get("judge_accuracy_short")
    return Fact("judge", f"{accuracy:.1%}", f"{short:.1%}" if is_number(short) else "")


def _lead(run: Json, method: str) -> str:
    """One sentence on what was done, from the parts that are known."""
    base = (run.get("base") or {}).get("id")
    parts = [f"The weights of {base} are frozen" if base else "The base model is frozen"]
    tokens = run.get("num_virtual_tokens")
    if is_number(tokens) and tokens:
        beside = "" if method == "prefix" else f" ({method})"
        parts.append(f"{tokens:,} virtual tokens in front of its attention layers{beside} do the steering")
    elif is_number(numbers := run.get("trainable_parameters")):
        parts.append(f"{numbers:,} numbers beside them ({method}) do the steering")
    text = "; ".join(parts) + "."
    if is_number(steps := run.get("steps")) and is_number(seconds := run.get("seconds")):
        text += f" Tuning them took {steps:,} steps and {format_duration(seconds)}."
    return text


def _section(values: Json, key: str) -> Json:
    section = values.get(key)
    return section if isinstance(section, Mapping) else {}
