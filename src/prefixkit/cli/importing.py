"""`prefixkit import`: a prefix out of other people's formats."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Read a prefix from another format, exactly or not at all.", no_args_is_help=True)


@app.callback()
def importing() -> None:
    """Read a prefix from another format, exactly or not at all."""


@app.command("peft")
def peft(
    folder: Annotated[Path, typer.Argument(help="What PEFT's save_pretrained wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder for the artefact.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Base model; the one the checkpoint names if left out.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of a hub model.")] = None,
    labels: Annotated[
        str | None, typer.Option("--labels", help="Names of its head's labels, A,B,...; PEFT's files hold none.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier artefact.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the artefact's card as JSON.")] = False,
) -> None:
    """Turn a PEFT prefix-tuning checkpoint into an artefact, bound to its base model."""
    from prefixkit.lab.interchange import import_peft

    names = None if labels is None else [name.strip() for name in labels.split(",")]
    card = import_peft(folder, out, base=base, revision=revision, labels=names, overwrite=overwrite).card
    if as_json:
        typer.echo(json.dumps(card.model_dump(mode="json")))
    else:
        head = "" if card.head is None else f", a head for {', '.join(card.head.labels)}"
        tokens = f"{card.position_offset} virtual tokens for {card.base.id}"
        typer.echo(f"{out}: {tokens}{head}, content {card.content_hash[:12]}")
