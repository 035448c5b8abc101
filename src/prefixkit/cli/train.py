"""`prefixkit train`: a run folder with the prefix, its scores and a report."""

import json
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, such as prefix.num_virtual_tokens=50.")
    ] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Run folder; runs/<name> if left out.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away the run in the folder.")] = False,
    memory_budget: Annotated[
        str | None, typer.Option("--memory-budget", help="Choose batches and checkpointing to fit, such as 1.5GB.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the whole recipe and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Train a prefix on a frozen base model, measure it, and write a report."""
    from prefixkit.config import dump_recipe, load_recipe

    settings = load_recipe(recipe, overrides or [])
    if dry_run:
        typer.echo(dump_recipe(settings), nl=False)
        return
    from prefixkit.cli.rendering import print_scores, progress
    from prefixkit.lab.run.memory import parse_bytes
    from prefixkit.lab.run.run import train_run
    from prefixkit.processes import is_first

    with progress() as report:
        run = train_run(
            settings,
            folder or Path("runs") / settings.name,
            resume=resume,
            overwrite=overwrite,
            memory_budget=None if memory_budget is None else parse_bytes(memory_budget),
            report=report,
        )
    if not is_first():
        return
    if as_json:
        typer.echo(json.dumps({"folder": str(run.folder), "report": str(run.report), "scores": run.scores}))
    else:
        print_scores(run)
