"""`prefixkit export`: a prefix in other people's formats."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Write a prefix in another format, exactly or not at all.", no_args_is_help=True)


@app.callback()
def export() -> None:
    """Write a prefix in another format, exactly or not at all."""


@app.command("peft")
def peft(
    run: Annotated[Path, typer.Argument(help="A trained run, or an artefact.")],
    out: Annotated[Path, typer.Argument(help="Folder for the checkpoint.")],
    base: Annotated[str | None, typer.Option("--base", help="Base model; the one the run names if left out.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write a prefix, or a LoRA alone, for PEFT's PeftModel.from_pretrained, which then gives the same answers."""
    from prefixkit.lab.interchange import export_peft

    card = export_peft(run, out, base=base, overwrite=overwrite).card
    if as_json:
        typer.echo(json.dumps({"folder": str(out), "base": card.base.id, "num_virtual_tokens": card.position_offset}))
    else:
        base = card.base.id if card.head is None else f"transformers' class with a head for {card.base.id}"
        typer.echo(f'{out}: load it with PeftModel.from_pretrained(base, "{out}"), base being {base}')
