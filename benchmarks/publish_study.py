"""Publish studies: copy their results, make a page and a picture of each, and list them in docs/studies.md.

    prefixkit study run length --workers 2
    python benchmarks/publish_study.py studies/length-teaching

Without a folder only the pages are written again, from what is published and what is claimed today.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from prefixkit.config import Size, load_study, study_names
from prefixkit.errors import PrefixkitError
from prefixkit.files import read_json, write_json, write_text
from prefixkit.lab.pages.comparison import format_value
from prefixkit.lab.pages.plots import standalone
from prefixkit.lab.study.claims import Verdict, judge
from prefixkit.lab.study.found import FOUND, write_found
from prefixkit.lab.study.measures import known_measures
from prefixkit.lab.study.page import baseline_rows, columns_of, outcome_counts
from prefixkit.lab.study.plots import layers_plot, measure_plot
from prefixkit.lab.study.results import STUDY, StudyResult, read_results, write_results
from prefixkit.lab.study.statistics import mean_beside_others

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "studies"
PAGE = ROOT / "docs" / "studies.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
#: What of a study decides nothing about its runs.
_WORDS = {"title", "question", "claims", "claimed", "beyond"}
PICTURE, LAYERS, STUDY_PAGE = "measured.svg", "layers.svg", "README.md"


def results_block(results: list[StudyResult]) -> str:
    """Return what docs/studies.md says between its marks: every published study, and how its claims fared."""
    lines = [BEGIN, "", "| study | | runs | claims | |", "|---|---|---|---|---|"]
    for result in results:
        name, runs = result.study.name, sum(len(arm.trials) for arm in result.arms)
        fared = ", ".join(f"{count.value} {count.name}" for count in outcome_counts(judge(result)))
        link = f"[`{name}`](results/studies/{name}/{STUDY_PAGE})"
        lines.append(f"| {link} | {result.study.title} | {runs} | {len(result.study.claims)} | {fared} |")
    known = {result.study.name for result in results}
    missing = [f"`{name}`" for name in study_names() if name not in known]
    without = ["", f"Shipped, and without a published result: {', '.join(missing)}."] if missing else []
    return "\n".join([*lines, *without, "", END])


def study_page(result: StudyResult) -> str:
    """Return the page of one study."""
    shown = known_measures()[result.study.measure].label
    lines = [
        f"# {result.study.title}",
        "",
        f"Made by `benchmarks/publish_study.py` from [{STUDY}]({STUDY}); do not edit it by hand.",
        "[How studies are made, and what their verdicts mean](../../../studies.md).",
        "",
        result.study.question,
        "",
        _source(result),
        "",
        f"![{shown} of every arm]({PICTURE})",
        "",
        *([f"![{shown} by the layers that have a prefix]({LAYERS})", ""] if _layers_picture(result) else []),
        *_table(result),
        "",
        *_claimed(result),
        "| claim | source | | measured |",
        "|---|---|---|---|",
        *(f"| {v.claim.says} | {v.claim.source} | **{v.ruling}** | {_measured(v)} |" for v in judge(result)),
        "",
    ]
    return "\n".join([*lines, *([result.study.beyond.strip(), ""] if result.study.beyond else [])])


def _layers_picture(result: StudyResult) -> str | None:
    return layers_plot(result, known_measures()[result.study.measure], name="layers")


def _measured(verdict: Verdict) -> str:
    """Return what came out, and what a reader should know about it."""
    claim = verdict.claim
    notes = [verdict.why, *(note for note in (claim.why, claim.beyond) if note and note != verdict.why)]
    return " · ".join(notes)


def _source(result: StudyResult) -> str:
    machine, budget = result.machine, ", ".join(f"{name} {value}" for name, value in result.budget.items() if value)
    replicates = max(len(arm.trials) for arm in result.arms)
    versions = ", ".join(f"{name} {version}" for name, version in _versions(result).items())
    return (
        f"Size {result.size}, {_recipes(result)}, {replicates} runs per arm; {budget}. {machine['cores']} cores, "
        f"{machine['cpu']}; {versions}."
    )


def _recipes(result: StudyResult) -> str:
    names = ", ".join(f"`{name}`" for name in result.recipes)
    return f"recipe {names}" if len(result.recipes) == 1 else f"recipes {names}"


def _versions(result: StudyResult) -> dict[str, str]:
    return next(outcome.versions for outcome in result.outcomes if outcome.versions)


def _table(result: StudyResult) -> list[str]:
    measures = [each for each in columns_of(result) if any(arm.values(each.key) for arm in result.arms)]
    lines = [
        "| arm | rate | runs | " + " | ".join(measure.label.lower() for measure in measures) + " |",
        "|---" * (len(measures) + 3) + "|",
    ]
    for arm in result.arms:
        rates = ", ".join(f"{rate:g}" for rate in arm.rates.values()) + (" (edge)" if arm.at_edge else "")
        lost = [trial.outcome for trial in arm.trials if trial.outcome.error is not None]
        runs = f"{len(arm.trials) - len(lost)} of {len(arm.trials)}"
        cells = []
        for measure in measures:
            found = mean_beside_others(arm, measure.key)
            text = "" if found is None else format_value(found.value, measure.unit)
            if found is not None and found.interval is not None and found.interval.low < found.interval.high:
                ends = (format_value(end, measure.unit) for end in (found.interval.low, found.interval.high))
                text += f" [{', '.join(ends)}]"
            cells.append(text)
        lines.append(f"| {arm.name} | {rates} | {runs} | " + " | ".join(cells) + " |")
    for row in baseline_rows(result, measures):
        lines.append(f"| {row.name} | | | " + " | ".join(cell.text for cell in row.cells) + " |")
    return lines


def _claimed(result: StudyResult) -> list[str]:
    """Return the table somebody else published for the arms, if there is one."""
    claimed = result.study.claimed
    if claimed is None:
        return []
    keys = dict.fromkeys(key for values in claimed.values.values() for key in values)
    measures = [known_measures()[key] for key in keys]
    rows = (
        " | ".join(format_value(values[each.key], each.unit) if each.key in values else "" for each in measures)
        for values in claimed.values.values()
    )
    return [
        f"What is claimed: {claimed.source}.",
        "",
        "| arm | " + " | ".join(measure.label.lower() for measure in measures) + " |",
        "|---" * (len(measures) + 1) + "|",
        *(f"| {name} | {row} |" for name, row in zip(claimed.values, rows, strict=True)),
        "",
    ]


def published() -> list[StudyResult]:
    """Return the published results, by name, held against the claims as they are written today."""
    return [as_shipped(read_results(path)) for path in sorted(RESULTS.glob(f"*/{STUDY}"))]


def as_shipped(result: StudyResult) -> StudyResult:
    """Put the shipped words, claims and published numbers in the place of those a study was run with.

    Raises:
        PrefixkitError: the shipped study has other arms, settings, rates or seeds than those that were run.
    """
    shipped, ran = load_study(result.study.name), result.study
    if shipped.model_dump(exclude=_WORDS) != ran.model_dump(exclude=_WORDS):
        raise PrefixkitError(f"{ran.name}: its study file runs something else by now; run it again")
    return replace(result, study=shipped)


def publish(folder: Path) -> None:
    """Copy a study's results, and draw its picture from them."""
    result = as_shipped(read_results(folder))
    mixed = result.mixed_versions or result.mixed_data or result.mixed_base or result.mixed_hardware
    if result.size == Size.TINY or mixed:
        raise PrefixkitError(f"{folder}: a tiny run, or one of mixed versions, data, base, hardware, is not published")
    target = RESULTS / result.study.name
    target.mkdir(parents=True, exist_ok=True)
    write_results(result, target)
    picture = measure_plot(result, known_measures()[result.study.measure], name="measured")
    if picture is not None:
        write_text(target / PICTURE, standalone(picture))
    if (layers := _layers_picture(result)) is not None:
        write_text(target / LAYERS, standalone(layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="*", help="folders of studies that were run")
    for folder in parser.parse_args().studies:
        publish(folder)
    results = published()
    for result in results:
        path = RESULTS / result.study.name / STUDY
        write_json(path, read_json(path) | {"study": result.study.model_dump(mode="json")})  # today's words
        write_text(RESULTS / result.study.name / STUDY_PAGE, study_page(result))
    write_found(results, ROOT / "src" / "prefixkit" / "studies" / FOUND)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    write_text(PAGE, before + results_block(results) + after)


if __name__ == "__main__":
    main()
