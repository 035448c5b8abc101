"""`prefixkit diagnose`: where a trained prefix gets its attention from."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def diagnose(
    folder: Annotated[
        Path, typer.Argument(help="A trained run, such as runs/positive-reviews, or an artefact of one.")
    ],
    rows: Annotated[int, typer.Option(min=1, help="Most held-out texts to read.")] = 16,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=2, help="Length of text to look at; left out, 512 or the length trained on, as far as texts reach."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write into; the run's own if left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole diagnosis as JSON.")] = False,
) -> None:
    """Measure how much attention each layer and head gives a prefix, and how it thins out as text grows."""
    from prefixkit.cli.rendering import progress
    from prefixkit.lab.diagnosis.findings import lines
    from prefixkit.lab.diagnosis.run import diagnose_run

    with progress() as report:
        done = diagnose_run(folder, rows=rows, tokens=tokens, out=out, report=report)
    if as_json:
        typer.echo(json.dumps(asdict(done.diagnosis)))
        return
    for line in lines(done.diagnosis):
        typer.echo(line)
    typer.echo(f"page: {done.page}")
