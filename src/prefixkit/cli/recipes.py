"""`prefixkit recipes`: the recipes that ship with prefixkit."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")]


@app.command("list")
def list_recipes() -> None:
    """List the shipped recipes."""
    from prefixkit.config import load_recipe, recipe_names

    for name in recipe_names():
        typer.echo(f"{name:20} {load_recipe(name).description}")


@app.command("show")
def show(recipe: Name, whole: Annotated[bool, typer.Option("--all", help="Defaults included.")] = False) -> None:
    """Print a recipe."""
    from prefixkit.config import dump_recipe, load_recipe, recipe_text

    typer.echo(dump_recipe(load_recipe(recipe)) if whole else recipe_text(recipe), nl=False)


@app.command("copy")
def copy(recipe: Name, target: Annotated[Path, typer.Argument(help="File to write.")]) -> None:
    """Copy a recipe to a file of your own."""
    from prefixkit.config import recipe_text
    from prefixkit.errors import ConfigError
    from prefixkit.files import write_text

    if target.exists():
        raise ConfigError(f"{target}: exists already; choose another file")
    write_text(target, recipe_text(recipe))


@app.command("check")
def check(recipe: Name) -> None:
    """Check a recipe without running it."""
    from prefixkit.config import load_recipe

    typer.echo(f"{load_recipe(recipe).name}: ok")
