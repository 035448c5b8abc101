"""The page of a study: claims with their verdicts, what was measured beside what was published, texts, and cost."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from markupsafe import Markup

from prefixkit.files import write_text
from prefixkit.lab.pages.comparison import Measure, format_value
from prefixkit.lab.pages.facts import Fact, flat_facts
from prefixkit.lab.pages.render import render_page
from prefixkit.lab.study.claims import Verdict, judge
from prefixkit.lab.study.measures import DIVERGED, SHOWN, known_measures
from prefixkit.lab.study.plots import layers_plot, measure_plot, rates_plot
from prefixkit.lab.study.results import ArmResult, StudyResult, read_results
from prefixkit.lab.study.statistics import mean_beside_others

PAGE = "study.html"
_NARROW_INCHES = 4.4
#: What is drawn beside the study's own measure.
_DRAWN = ("sentiment_accuracy", "seconds_per_step", "seconds_per_token", "peak_memory_bytes")
_SYSTEMS = {
    "base.": "base model", "instruction.": "base model, instruction", "real.": "people",
    "head.": "a head without a prefix", "words.": "bag of words", "majority.": "commonest label",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One value of the table: measured, its interval, and what was published for it; empty where there is none."""

    text: str = ""
    interval: str = ""
    claimed: str = ""


@dataclass(frozen=True)
class Row:
    """One arm in the table, or a baseline, which has no rates."""

    name: str
    rates: Sequence[Fact]
    at_edge: bool
    runs: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Drawing:
    """One picture in two widths."""

    title: str
    meaning: str
    wide: Markup
    narrow: Markup


def write_page(folder: Path) -> Path:
    """Write a study's page from its results, and return its path.

    Raises:
        ArtefactError: there are none, or they are damaged.
    """
    path = folder / PAGE
    write_text(path, render_study(read_results(folder)))
    return path


def render_study(result: StudyResult) -> str:
    """Return the page; it needs no network and no scripts."""
    verdicts = judge(result)
    columns = columns_of(result)
    machine = {key: result.machine.get(key) for key in ("cpu", "cores", "memory_bytes", "platform", "accelerator")}
    return render_page(
        "study.html",
        study=result.study,
        size=result.size,
        counts=outcome_counts(verdicts),
        verdicts=verdicts,
        columns=columns,
        rows=[*(_row(arm, columns, result) for arm in result.arms), *baseline_rows(result, columns)],
        drawings=_drawings(result),
        rates=_rates(result),
        samples=[(arm.name, text) for arm in result.arms if (text := _sample(arm))],
        failures=_failures(result),
        mixed=result.mixed_versions,
        mixed_data=result.mixed_data,
        mixed_hardware=result.mixed_hardware,
        replicates=max((len(arm.trials) for arm in result.arms), default=0),
        budget=flat_facts(result.budget | {"recipe": ", ".join(result.recipes)}),
        settings=[Fact(key, value) for key, value in result.settings.items()]
        + [Fact(key, value) for key, _, value in (each.partition("=") for each in result.overrides)],
        machine=flat_facts(machine),
        versions=flat_facts(next((each.versions for each in result.outcomes if each.versions), {})),
    )


def columns_of(result: StudyResult) -> list[Measure]:
    """Return the measures a table of a study shows: its own, the usual ones that its arms have, and those claimed."""
    published = result.study.claimed.values.values() if result.study.claimed else ()
    claimed = {key for values in published for key in values}
    usual = [key for key in SHOWN if key in claimed or any(arm.values(key) for arm in result.arms)]
    own = [] if result.study.measure in usual else [result.study.measure]
    return [known_measures()[key] for key in dict.fromkeys([*own, *usual, *sorted(claimed)])]


def outcome_counts(verdicts: Sequence[Verdict]) -> list[Fact]:
    """Return how many claims came to each ruling, those that none came to left out."""
    counts = Counter(verdict.ruling for verdict in verdicts)
    return [Fact(str(outcome), str(count)) for outcome, count in sorted(counts.items())]


def _row(arm: ArmResult, columns: Sequence[Measure], result: StudyResult) -> Row:
    failed = [trial for trial in arm.trials if trial.outcome.error is not None]
    diverged = sum(trial.outcome.has_diverged for trial in failed)
    runs = f"{len(arm.trials) - len(failed)} of {len(arm.trials)}" + (f", {diverged} diverged" if diverged else "")
    claimed = result.study.claimed.values.get(arm.name, {}) if result.study.claimed else {}
    rates = [Fact(key.split(".")[0], f"{rate:g}", f"x{arm.factor:g}") for key, rate in arm.rates.items()]
    cells = [_cell(arm, measure, claimed.get(measure.key)) for measure in columns]
    return Row(arm.name, rates, arm.at_edge, runs if arm.trials else "no rate trained to its end", cells)


def _cell(arm: ArmResult, measure: Measure, claimed: float | None) -> Cell:
    published = "" if claimed is None else format_value(claimed, measure.unit)
    found = mean_beside_others(arm, measure.key)
    if found is None:
        return Cell(claimed=published)
    interval = found.interval
    is_known = interval is not None and interval.low < interval.high
    ends = [format_value(end, measure.unit) for end in (interval.low, interval.high)] if interval and is_known else []
    return Cell(format_value(found.value, measure.unit), " – ".join(ends), published)


def baseline_rows(result: StudyResult, columns: Sequence[Measure]) -> list[Row]:
    """Return a table's rows of what no arm trained: the base model, alone and with an instruction, and people."""
    rows = []
    for recipe, (prefix, name) in product(result.recipes, _SYSTEMS.items()):
        found = result.baselines(recipe)
        values = [found.get(prefix + measure.key) for measure in columns]
        if any(value is not None for value in values):
            cells = [
                Cell() if value is None else Cell(format_value(value, measure.unit))
                for value, measure in zip(values, columns, strict=True)
            ]
            rows.append(Row(name if len(result.recipes) == 1 else f"{recipe}: {name}", (), False, "", cells))
    return rows


def _drawings(result: StudyResult) -> list[Drawing]:
    known = known_measures()
    drawings = []
    for key in dict.fromkeys((result.study.measure, *_DRAWN)):
        wide = measure_plot(result, known[key], name=f"plot-{key}")
        narrow = measure_plot(result, known[key], name=f"plot-{key}-narrow", width=_NARROW_INCHES)
        if wide is not None and narrow is not None:
            # Markup: these SVGs are made here from numbers and from names that matplotlib escapes.
            drawings.append(Drawing(known[key].label, known[key].meaning, Markup(wide), Markup(narrow)))
    own = known[result.study.measure]
    wide = layers_plot(result, own, name="layers")
    narrow = layers_plot(result, own, name="layers-narrow", width=_NARROW_INCHES)
    if wide is not None and narrow is not None:
        meaning = f"The layers that each arm gives a prefix, the darker the better its {own.label.lower()} (right)."
        drawings.insert(1, Drawing("What each layer is worth", meaning, Markup(wide), Markup(narrow)))
    return drawings


def _rates(result: StudyResult) -> Drawing | None:
    wide, narrow = rates_plot(result, name="rates"), rates_plot(result, name="rates-narrow", width=_NARROW_INCHES)
    if wide is None or narrow is None:
        return None
    return Drawing("Learning rates", "", Markup(wide), Markup(narrow))


def _sample(arm: ArmResult) -> str:
    return next((trial.outcome.samples[0] for trial in arm.trials if trial.outcome.samples), "")


def _failures(result: StudyResult) -> list[Fact]:
    """Return what failed and why, rates that were tried among them."""
    found = [
        Fact(f"{arm.name}, seed {trial.replicate.seed}", trial.outcome.error or "")
        for arm in result.arms
        for trial in arm.trials
        if trial.outcome.error is not None
    ]
    found += [
        Fact(f"{arm.name}, rate x{each.factor:g}", each.error or "no validation loss")
        for arm in result.arms
        for each in arm.tried
        if each.validation_loss is None
    ]
    return found


def diverged_share(result: StudyResult) -> tuple[int, int]:
    """Return how many trials diverged, and how many there were, rates that were tried not among them."""
    outcomes = result.outcomes
    return sum(outcome.values.get(DIVERGED) == 1 for outcome in outcomes), len(outcomes)
