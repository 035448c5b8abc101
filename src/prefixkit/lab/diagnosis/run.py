"""Diagnosing a run: its own held-out texts are read with the prefix attached, and what was found is written down."""

from dataclasses import asdict, dataclass
from pathlib import Path

from prefixkit.config import DataConfig
from prefixkit.data import Example, heldout_texts
from prefixkit.errors import ArtefactError, EvaluationError
from prefixkit.evaluation.attention_mass import measure_mass
from prefixkit.files import write_json, write_text
from prefixkit.lab.diagnosis.record import Diagnosis
from prefixkit.lab.diagnosis.summary import diagnose
from prefixkit.lab.run.folder import DIAGNOSIS, DIAGNOSIS_PAGE, RECIPE
from prefixkit.lab.run.loaded_run import load_run
from prefixkit.lab.run.run import Report, tell_nobody
from prefixkit.models import Base
from prefixkit.models.inspect import Kind, inspect_model
from prefixkit.models.specials import around_text
from prefixkit.prefix import Prefix

#: Tokens of text to look at where nothing else is asked for: well beyond what is usually trained on.
_TOKENS = 512


@dataclass(frozen=True)
class DiagnosedRun:
    """A diagnosis and the files it was written to."""

    diagnosis: Diagnosis
    record: Path
    page: Path


def diagnose_run(
    folder: Path, *, rows: int = 16, tokens: int | None = None, out: Path | None = None, report: Report = tell_nobody
) -> DiagnosedRun:
    """Diagnose a trained prefix on held-out texts of its own recipe; write ``diagnosis.json`` and ``.html``.

    Args:
        folder: a run folder, or an artefact a run left.
        rows: most texts to read.
        tokens: length of text to look at; left out, 512 or the length trained on, where texts and context allow.
        out: folder to write into; the run's own if left out.
        report: told about progress; nobody is if left out.

    Raises:
        ArtefactError: the folder is no artefact that knows its recipe, or belongs to another base model.
        EvaluationError: no text is as long as `tokens`, or the context is too short for it; or `out` is a file.
        DataError: the recipe's data cannot be read.
    """
    from prefixkit.lab.diagnosis.page import render_diagnosis

    if not (folder / RECIPE).is_file() and Prefix.load(folder).card.training is None:
        raise ArtefactError(
            f"{folder}: holds no recipe, so there are no held-out texts to read; diagnose a run or what it left"
        )
    if out is not None and out.exists() and not out.is_dir():
        raise EvaluationError(f"--out: {out} is a file; give a folder")
    base, prefix, recipe = load_run(folder)
    examples = choose_texts(base, prefix, recipe.data, rows=rows, tokens=tokens)
    mass = measure_mass(
        base,
        prefix,
        examples,
        within=recipe.data.max_tokens,
        on_progress=lambda done, total: report("diagnosing", done, total, "texts read"),
    )
    found = diagnose(base, prefix, mass, name=recipe.name, source=recipe.data.source, texts=len(examples))
    record, page = (out or folder) / DIAGNOSIS, (out or folder) / DIAGNOSIS_PAGE
    write_json(record, asdict(found))
    write_text(page, render_diagnosis(found))
    return DiagnosedRun(found, record, page)


def choose_texts(
    base: Base, prefix: Prefix, config: DataConfig, *, rows: int, tokens: int | None
) -> tuple[Example, ...]:
    """Return held-out texts to read, all of them `tokens` long if that was asked for.

    A row of an encoder-decoder is as long as the longer of its two texts.

    Raises:
        EvaluationError: `tokens` are more than the context holds, or than any held-out text has, or too few for text.
    """
    wanted = _most_tokens(base, prefix, config) if tokens is None else tokens
    if tokens is not None:
        _check_tokens(base, prefix, config, tokens)
    found = heldout_texts(
        config,
        base.tokenizer,
        max_tokens=wanted,
        count=rows,
        start=base.start_token_id,
        reads_both_ways=base.reads_both_ways,
    )
    if tokens is None:
        return found
    whole = tuple(example for example in found if example.longest == tokens)
    if not whole:
        longest = found[0].longest
        raise EvaluationError(
            f"--tokens: no held-out text of {config.source} has {tokens} tokens, the longest has {longest}; "
            f"give at most {longest}"
        )
    return whole


def _most_tokens(base: Base, prefix: Prefix, config: DataConfig) -> int:
    wanted = max(_TOKENS, config.max_tokens)
    return wanted if base.context_tokens is None else min(wanted, base.context_tokens - prefix.position_offset)


def _check_tokens(base: Base, prefix: Prefix, config: DataConfig, tokens: int) -> None:
    limit, special = base.context_tokens, 0
    if config.format.is_classified or inspect_model(base.model).kind is not Kind.DECODER:
        special = sum(map(len, around_text(base.tokenizer)))
    if tokens <= special:
        raise EvaluationError(f"--tokens: {tokens} leaves no room for text beside {special} special tokens; give more")
    if limit is not None and prefix.position_offset + tokens > limit:
        raise EvaluationError(
            f"--tokens: prefix {prefix.position_offset} + text {tokens} exceed the model's context of {limit}; "
            f"give at most {limit - prefix.position_offset}"
        )
