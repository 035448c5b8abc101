"""`prefixkit classify`: labels from a trained prefix and its head."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def classify(
    folder: Annotated[Path, typer.Argument(help="A trained run that learned labels, such as runs/review-sentiment.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to label; left out, each line of stdin.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per text, with all probabilities.")] = False,
) -> None:
    """Label texts with a trained prefix; each word of them, where the run learned tags."""
    from prefixkit.errors import ArtefactError
    from prefixkit.prefix import HeadKind, Prefix

    given = texts or [line for line in sys.stdin.read().splitlines() if line.strip()]
    head = Prefix.load(folder).head
    if head is None:
        raise ArtefactError(f"{folder}: this prefix learned text, and has no head; see `prefixkit generate`")
    from prefixkit.classification import classify, tag
    from prefixkit.lab.run import load_run_base

    base, prefix, _ = load_run_base(folder)
    if head.kind is HeadKind.TOKEN:
        for row in tag(base, [text.split() for text in given], prefix):
            words = [{"word": each.word, "label": each.label, "probability": each.probability} for each in row]
            plain = " ".join(each.word if each.label is None else f"{each.word}/{each.label}" for each in row)
            typer.echo(json.dumps(words, ensure_ascii=False) if as_json else plain)
        return
    for text, found in zip(given, classify(base, given, prefix), strict=True):
        line = {"text": text, "label": found.label, "probabilities": found.probabilities, "is_cut": found.is_cut}
        plain = f"{found.label}  {found.probabilities[found.label]:.1%}  {text}"
        typer.echo(json.dumps(line, ensure_ascii=False) if as_json else plain)
