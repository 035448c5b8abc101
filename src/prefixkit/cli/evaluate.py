"""`prefixkit evaluate`: measure a trained run again."""

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    folder: Annotated[Path, typer.Argument(help="A trained run, such as runs/positive-reviews.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="evaluation.* and generation.* settings to change.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Measure a trained prefix against the base model and what else it is compared with in its report."""
    from prefixkit.config import dump_recipe, parse_recipe
    from prefixkit.errors import ConfigError
    from prefixkit.lab.run.folder import read_recipe

    for override in overrides or []:
        if not override.startswith(("evaluation.", "generation.")):
            raise ConfigError(f"{override}: only evaluation.* and generation.* can change after training")
    recipe = parse_recipe(dump_recipe(read_recipe(folder)), overrides or [])
    from prefixkit.cli.rendering import print_scores, progress
    from prefixkit.lab.run.run import evaluate_run

    with progress() as report:
        run = evaluate_run(folder, recipe, report=report)
    if as_json:
        typer.echo(json.dumps(run.scores))
    else:
        print_scores(run)
