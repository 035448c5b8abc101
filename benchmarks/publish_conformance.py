"""Turn a report of the conformance suite into docs/results/conformance.json and the page docs/conformance.md.

    .venv/bin/python -m pytest tests/conformance --conformance-report report.json
    .venv/bin/python benchmarks/publish_conformance.py report.json

A report with a wrong cell is not published. `tests/conformance/test_page.py` holds the page against the registry.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prefixkit.errors import EvaluationError, PrefixkitError
from prefixkit.files import read_json, write_text

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from conformance.encoder_families import ENCODER_DECODERS, ENCODERS  # noqa: E402 - the registry stands with the tests
from conformance.families import FAMILIES  # noqa: E402
from conformance.paths import PATHS  # noqa: E402
from conformance.refusals import REFUSED, Refusal  # noqa: E402

RESULTS = ROOT / "docs" / "results" / "conformance.json"
PAGE = ROOT / "docs" / "conformance.md"

#: Names of model classes in messages.
_MODEL = r"\w+(?:ForCausalLM|LMHeadModel|ForConditionalGeneration|MTModel)"
#: The tables of the page.
KINDS = {"Decoder-only": list(FAMILIES), "Encoder-decoder": list(ENCODER_DECODERS), "Encoder": list(ENCODERS)}
#: Where PEFT 0.21.2's prefix tuning was measured to fail, and what holds prefixkit to it here: a path, or a test.
RIVAL = {
    "gradient checkpointing is refused": "checkpointing",
    "the effect of a prefix is 0 past a sliding window": (
        "tests/injection/test_attach_equivalence.py::test_the_prefix_stays_visible_past_the_sliding_window"
    ),
    "one prefix per row is ignored": "mixed",
    "a static cache is an error, and gives T5 wrong tokens": "static",
    "assisted decoding is an error": "assisted",
    "prompt lookup is an error": "lookup",
    "`use_cache=False` is an error": "no-cache",
    "a returned cache cannot be passed back": "continued",
    "packed documents leak into each other": "packed",
    "beside LoRA, the LoRA is frozen and dropped on saving": "lora",
    "flan-t5-small, T5-3B and distilbart (fewer layers in one stack: `bart` above) fail": "placements",
    "of an encoder-decoder only decoder self-attention gets a prefix, and its layers share halves": "placements",
    "`is_trainable=True` on loading is refused": (
        "tests/peft_api/test_model.py::test_what_peft_saved_loads_with_the_same_answers_and_trains_on"
    ),
    "a run with an MLP cannot be resumed": (
        "tests/peft_api/test_trainer.py::test_a_projected_run_that_was_stopped_resumes_exactly"
    ),
    "the MLP runs for every row, and keys and values are copied for each": (
        "tests/injection/test_attach.py::test_the_encoder_runs_once_per_forward_pass_whatever_the_batch"
    ),
}
PAGE_TEXT = """\
# Conformance

Made by `benchmarks/publish_conformance.py` from a run of `tests/conformance`; do not edit it by hand.

{counts} families, as tiny random models in float64, and {ways} ways to use them:
{cells:,} cells, of which {exact:,} are exact (1e-10 unless said below, gradients where there are any), {refused:,} are
refused with a message that a test asserts, and none is anything else. {versions}.

✔ exact · a number: refused, or in some settings only, for the reason below · empty: not tried, as the path does not
depend on the family, or does not apply to it. Names that end in `-window` are a family's configuration with a window;
T5's several entries are the geometries of its releases.

{tables}

## Refusals

Where a message is not prefixkit's, transformers itself refuses or fails, without a prefix too.

{notes}

## How each path is judged

*The loops* are a second implementation that shares nothing with injection: attention computed one row, one head and one
query at a time, under a registry name of its own.

| path | judged by |
|---|---|
{judged}

Beside the cells, the slow tests draw 2,000 random batches (family, lengths per layer, gates, rows, padding, a cut
between two cached passes) and compare each with the loops, and build every causal language model of transformers that
common sizes can make a tiny one of, and every encoder-decoder and encoder: each is exact or refused by name.

Contrastive search, DoLa, group beams and constrained beams left transformers for code on its hub, which no test runs:
such code (`custom_generate`) gets one prefix for all rows, and with one per row it is refused, as it may repeat rows in
any order. A cache that is put together anew from bare tensors, such as `DynamicCache(list(cache))`, bears no mark of
the prefix it was filled under: keep the cache that `generate` or the model returns.
Of the quantised caches only fp8 works without another package. transformers itself refuses
assisted decoding and prompt lookup for more than one row.

## Families that are refused

| model type | reason |
|---|---|
{families}

## Where PEFT's prefix tuning fails

Measured with peft 0.21.2. A base model beyond its geometry, multi-query Falcon, is refused here too; multi-query
GPTBigCode is not.

| PEFT | here |
|---|---|
{rival}
"""


def summarise(report: Mapping[str, Any]) -> dict[str, Any]:
    """Count outcomes per family and path; refuse a report in which anything is wrong.

    Raises:
        EvaluationError: a cell was wrong.
    """
    families: dict[str, Any] = {name: {} for names in KINDS.values() for name in names}
    for cell in report["cells"]:
        if cell["outcome"] not in ("exact", "refused"):
            raise EvaluationError(
                f"{cell['family']}, {cell['path']} {cell['settings']}: {cell['outcome']}; not published"
            )
        entry = families[cell["family"]].setdefault(cell["path"], {"exact": 0, "refused": {}})
        if cell["outcome"] == "exact":
            entry["exact"] += 1
        else:
            message = _general(cell["message"])
            entry["refused"][message] = entry["refused"].get(message, 0) + 1
    return {"versions": report["versions"], "families": families}


def _general(message: str) -> str:
    """A refusal without the name, fingerprints and sizes of the model at hand, so that equal reasons are one.

    Where the message is a whole module printed, what is said of it stands in the last line.
    """
    message = re.sub(r"^'(.*)'$", r"\1", message).splitlines()[-1].removeprefix(") ")  # a KeyError's is quoted
    message = re.sub(rf"^{_MODEL}: ", "", message)
    message = re.sub(r"(size of tensor [ab]) \(\d+\)", r"\1", message)
    return re.sub(rf"\b{_MODEL}\b", "MODEL", re.sub(r"\b[0-9a-f]{12}\b", "...", message))


def render(summary: Mapping[str, Any]) -> str:
    """The page."""
    notes: dict[str, int] = {}
    families = summary["families"]
    tables = [_table(kind, {name: families[name] for name in names}, notes) for kind, names in KINDS.items()]
    entries = [entry for cells in families.values() for entry in cells.values()]
    exact = sum(entry["exact"] for entry in entries)
    refused = sum(sum(entry["refused"].values()) for entry in entries)
    return PAGE_TEXT.format(
        counts=", ".join(f"{len(names)} {kind.lower()}" for kind, names in KINDS.items()),
        ways=len(PATHS),
        cells=exact + refused,
        exact=exact,
        refused=refused,
        versions=", ".join(f"{name} {version}" for name, version in summary["versions"].items()).capitalize(),
        tables="\n\n".join(tables),
        notes="\n".join(f"{number}. {message}" for message, number in notes.items()),
        judged="\n".join(_row([path.title, path.judged]) for path in PATHS.values()),
        families="\n".join(_row([name, _reason(refusal)]) for name, refusal in REFUSED.items()),
        rival="\n".join(
            _row([failure, PATHS[proof].title if proof in PATHS else f"`{proof.rpartition('::')[2]}`"])
            for failure, proof in RIVAL.items()
        ),
    )


def _table(kind: str, families: Mapping[str, Any], notes: dict[str, int]) -> str:
    """The families of one kind; paths that none of them has are left out."""
    paths = [path for path in PATHS if any(path in cells for cells in families.values())]
    rows = [_row([kind, *(PATHS[path].title for path in paths)]), "|---" * (len(paths) + 1) + "|"]
    rows += [_row([name, *(_mark(cells.get(path), notes) for path in paths)]) for name, cells in families.items()]
    return "\n".join(rows)


def _row(fields: Iterable[str]) -> str:
    return "| " + " | ".join(fields) + " |"


def _mark(entry: Mapping[str, Any] | None, notes: dict[str, int]) -> str:
    """One field of the table; a refusal not met before gets the next number."""
    if entry is None:
        return ""
    numbers = [str(notes.setdefault(message, len(notes) + 1)) for message in entry["refused"]]
    return " ".join(["✔"] * bool(entry["exact"]) + numbers)


def _reason(refusal: Refusal) -> str:
    """Why a family is refused, and from which release of transformers on it is not."""
    return refusal.reason if refusal.until is None else f"{refusal.reason}; transformers {refusal.until} takes one"


def main() -> int:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="what pytest wrote with --conformance-report")
    options = parser.parse_args()
    try:
        summary = summarise(read_json(options.report))
        write_text(RESULTS, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        write_text(PAGE, render(summary))
    except PrefixkitError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
