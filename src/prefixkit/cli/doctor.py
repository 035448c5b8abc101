"""`prefixkit doctor`: is everything here that a run needs?"""

import json
from dataclasses import asdict
from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check versions, hardware, number format, threads, model and data; say how to mend what is wrong."""
    from prefixkit.lab.doctor import examine

    checks = examine()
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks]))
    else:
        for check in checks:
            typer.echo(f"{'ok ' if check.is_fine else 'no '} {check.name:16} {check.found}")
            if not check.is_fine:
                typer.echo(f"{'':20} -> {check.fix}")
    if not all(check.is_fine for check in checks):
        raise typer.Exit(1)
