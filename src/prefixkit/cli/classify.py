"""`prefixkit classify`: labels from a trained prefix and its head."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def classify(
    folder: Annotated[Path, typer.Argument(help="A trained run that learned labels, such as runs/review-sentiment.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to label; left out, each line of stdin.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One line of JSON per text, with probabilities; of tags, a list of words.")
    ] = False,
) -> None:
    """Label texts with a trained prefix; where it learned tags, each word between white space."""
    from prefixkit.cli.rendering import progress
    from prefixkit.errors import ArtefactError
    from prefixkit.prefix import HeadKind, Prefix

    head = Prefix.load(folder).head
    if head is None:
        raise ArtefactError(f"{folder}: this artefact learned text, and has no head; see `prefixkit generate`")
    given = texts or _lines()
    from prefixkit.classification import classify, tag
    from prefixkit.lab.run.loaded_run import load_run

    base, prefix, _ = load_run(folder)
    with progress() as report:

        def told(done: int, total: int) -> None:
            report("labelling", done, total, "texts")

        if head.kind is HeadKind.TOKEN:
            tagged = tag(base, [text.split() for text in given], prefix, on_progress=told)
        else:
            found = classify(base, given, prefix, on_progress=told)
    if head.kind is HeadKind.TOKEN:
        for row in tagged:
            words = [{"word": each.word, "label": each.label, "probability": each.probability} for each in row]
            plain = " ".join(each.word if each.label is None else f"{each.word}/{each.label}" for each in row)
            typer.echo(json.dumps(words, ensure_ascii=False) if as_json else plain)
        return
    if cut := sum(own.is_cut for own in found):
        typer.echo(
            f"{cut} of {len(found)} texts were longer than what is read; their labels are of the beginning", err=True
        )
    for text, own in zip(given, found, strict=True):
        line = {"text": text, "label": own.label, "probabilities": own.probabilities, "is_cut": own.is_cut}
        plain = f"{own.label}  {own.probabilities[own.label]:.1%}  {text}"
        typer.echo(json.dumps(line, ensure_ascii=False) if as_json else plain)


def _lines() -> list[str]:
    """Return the lines of stdin that say something."""
    from prefixkit.errors import DataError

    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError:
        raise DataError("stdin: not UTF-8 text; convert it first") from None
    lines = [line.strip("\r") for line in text.split("\n") if line.strip()]
    if not lines:
        raise DataError("no texts: give them as arguments, or one per line on stdin")
    return lines
