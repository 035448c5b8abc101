"""`prefixkit`: train a prefix, generate with it, measure it, look at it."""

import sys
from typing import Annotated

import typer

from prefixkit import __version__
from prefixkit.cli import (
    advise,
    classify,
    diagnose,
    doctor,
    estimate,
    evaluate,
    export,
    generate,
    importing,
    inspect,
    recipes,
    show,
    study,
    sweep,
    train,
)
from prefixkit.cli.failing import run_app, take_termination_as_interrupt
from prefixkit.parent import end_with_parent

app = typer.Typer(
    name="prefixkit",
    help="Prefix tuning for frozen language models: train a prefix, trust it, compare it honestly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train.train)
app.command("estimate")(estimate.estimate)
app.command("advise")(advise.advise)
app.command("sweep")(sweep.sweep)
app.command("generate")(generate.generate)
app.command("classify")(classify.classify)
app.command("evaluate")(evaluate.evaluate)
app.command("diagnose")(diagnose.diagnose)
app.command("show")(show.show)
app.command("inspect")(inspect.inspect)
app.command("doctor")(doctor.doctor)
app.add_typer(export.app, name="export")
app.add_typer(importing.app, name="import")
app.add_typer(recipes.app, name="recipes")
app.add_typer(study.app, name="study")


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(__version__)
        raise typer.Exit
    return asked


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the debug log.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the command."""
    from prefixkit.logs import configure
    from prefixkit.processes import is_first

    configure(debug=debug, quiet=not is_first())


def main() -> None:
    """Run the command line: one-line errors and exit 1; Ctrl-C and SIGTERM exit 130."""
    take_termination_as_interrupt()
    end_with_parent()
    sys.exit(run_app(app, sys.argv[1:]))
