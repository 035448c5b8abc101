"""Publish a run that learned labels: copy its files, and put its scores into docs/classification.md.

    .venv/bin/python benchmarks/publish_labels.py runs/review-sentiment

What was predicted is copied without the texts. `tests/test_results.py` holds the page against the files.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixkit.errors import PrefixkitError
from prefixkit.files import read_json, write_text
from prefixkit.lab.pages.comparison import compare
from prefixkit.lab.pages.facts import format_bytes, format_duration
from prefixkit.lab.run.folder import METRICS, PREDICTIONS, RUN, SCORES
from prefixkit.lab.run.predictions import read_predictions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "classification.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
COLUMNS = {"majority": "commonest label", "words": "bag of words", "head": "head alone", "prefix": "prefix"}
KEYS = ("accuracy", "macro_f1", "entity_f1", "heldout_nll")

Json = Mapping[str, Any]


def copy_run(run: Path, target: Path) -> None:
    """Copy what a run left; of the predictions, everything but the texts."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (RUN, SCORES, METRICS):
        shutil.copyfile(run / name, target / name)
    lines = [json.loads(line) | {"text": ""} for line in (run / PREDICTIONS).read_text(encoding="utf-8").splitlines()]
    write_text(target / PREDICTIONS, "".join(json.dumps(line) + "\n" for line in lines))


def results_block(run: Json, scores: Json, predictions: Sequence[Json]) -> str:
    """Return what docs/classification.md says between its marks."""
    machine = run["machine"]
    rows = {row.measure.key: row for row in compare(scores)}
    lines = [
        f"One run of `prefixkit train {run['name']}` ({run['base']['id']}, {run['base']['dtype']}, seed {run['seed']}; "
        f"{machine['cores']} cores, {machine['cpu']}): {run['trainable_parameters']:,} numbers trained in "
        f"{run['steps']} steps and {format_duration(run['seconds'])}, step {run['best_step']} kept, measured in "
        f"{format_duration(run['evaluation_seconds'])}, peak memory {format_bytes(run['peak_memory_bytes'])}; "
        f"{len(predictions):,} held-out texts. 95% intervals in brackets.",
        "",
        "| | " + " | ".join(COLUMNS.values()) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for key in KEYS:
        if key in rows:
            cells = [rows[key].cells.get(column) for column in COLUMNS]
            texts = ["" if cell is None else f"{cell.text} [{cell.interval_text}]" for cell in cells]
            lines.append(f"| {rows[key].measure.label} | " + " | ".join(texts) + " |")
    found = read_predictions(predictions)
    assert found is not None
    lines += ["", "| true \\ predicted | " + " | ".join(found.labels) + " |", "|---|" + "---|" * len(found.labels)]
    for row in found.confusion:
        counts = (f"{count:,} ({share:.1%})" for count, share in zip(row.counts, row.shares, strict=True))
        lines.append(f"| {row.label} | " + " | ".join(counts) + " |")
    return "\n".join([BEGIN, "", *lines, "", END])


def read_published(name: str) -> tuple[Json, Json, list[Json]]:
    """Return run, scores and predictions of a published run."""
    folder = RESULTS / name
    lines = (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()
    return read_json(folder / RUN), read_json(folder / SCORES), [json.loads(line) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run folder")
    folder = parser.parse_args().run
    name = read_json(folder / RUN)["name"]
    copy_run(folder, RESULTS / name)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    write_text(PAGE, before + results_block(*read_published(name)) + after)


if __name__ == "__main__":
    try:
        main()
    except PrefixkitError as error:
        sys.exit(str(error))
