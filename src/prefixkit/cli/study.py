"""`prefixkit study`: what shipped studies ask, running them, and their pages."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from prefixkit.cli.trials import Address, Cores, Gpus, On, Where, Workers, runner_of

app = typer.Typer(help="Studies: arms that differ in a few settings, held against claims.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A shipped study, or a study file.")]
Sizes = Literal["tiny", "teaching", "full"]  # prefixkit.config.Size, whose import would take help a quarter of a second
HOME = Path("studies")


@app.command("list")
def list_studies(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List the shipped studies."""
    from prefixkit.config import load_study, study_names

    studies = [load_study(name) for name in study_names()]
    if as_json:
        entries = [
            {
                "name": each.name,
                "question": each.question,
                "arms": len(each.expanded_arms()),
                "claims": len(each.claims),
            }
            for each in studies
        ]
        typer.echo(json.dumps(entries))
        return
    for each in studies:
        typer.echo(f"{each.name:20}{each.title} ({len(each.expanded_arms())} arms, {len(each.claims)} claims)")


@app.command()
def show(name: Name) -> None:
    """Print a study as it is written, to copy and change."""
    from prefixkit.config import study_text

    typer.echo(study_text(name), nl=False)


@app.command()
def run(
    name: Name,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings for all arms, such as model.base=gpt2 or train.steps=50.")
    ] = None,
    size: Annotated[Sizes, typer.Option("--size", help="How much of it is run.")] = "teaching",
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Another recipe than the study's, for arms without one.")
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Another number of seeds than the study's.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder; studies/<name>-<size> if left out.")] = None,
    where: On = Where.LOCAL,
    workers: Workers = 1,
    address: Address = None,
    cores: Cores = 1,
    gpus: Gpus = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print arms and trials, and stop.")] = False,
) -> None:
    """Run a study, or what of it is missing, and write its page."""
    from prefixkit.config import Size, load_study
    from prefixkit.errors import ConfigError, SweepError
    from prefixkit.processes import count

    if count() > 1:
        raise ConfigError("a study starts its own processes; start it without torchrun or accelerate launch")
    study = load_study(name)
    own = HOME / _folder_name(study.name, size, recipe, overrides or [])
    home = (folder or own).absolute()  # for workers of Ray, which are elsewhere
    from prefixkit.lab.study.plan import plan_study

    plan = plan_study(study, home, size=Size(size), recipe=recipe, overrides=overrides or (), seeds=seeds)
    if dry_run:
        for arm in plan.arms:
            rates = ", ".join(f"{key} {rate:g}" for key, rate in arm.rates.items())
            factors = " ".join(f"x{factor:g}" for factor in arm.factors)
            typer.echo(f"{arm.name}: {rates}; {factors}; {len(plan.replicates)} replicates")
        return
    from prefixkit.cli.rendering import print_verdicts, progress
    from prefixkit.lab.study.page import write_page
    from prefixkit.lab.study.run import run_study

    runner = runner_of(where, workers=workers, address=address, cores=cores, gpus=gpus)
    with progress() as report:
        result = run_study(plan, runner, report=report)
    print_verdicts(result, write_page(home))
    if broken := result.unfinished:
        words = f"{len(broken)} runs did not come to their end; the first: {broken[0]}"
        raise SweepError(f"{words}; started again, the study goes on")


@app.command()
def report(
    studies: Annotated[
        list[str] | None, typer.Argument(help="Names or folders of studies that were run; all in studies/ if left out.")
    ] = None,
) -> None:
    """Write the pages of studies again from their results, and an index page over them."""
    from prefixkit.errors import ArtefactError
    from prefixkit.lab.study.index import write_index
    from prefixkit.lab.study.page import write_page
    from prefixkit.lab.study.results import STUDY

    named = {name: _folders_of(name, STUDY) for name in studies or ["*"]}
    for name, folders in named.items():
        if not folders:
            where = name if studies else HOME
            raise ArtefactError(f"{where}: no results of a study; run one first, `prefixkit study run NAME`")
    found = sorted({folder for folders in named.values() for folder in folders})
    for folder in found:
        typer.echo(write_page(folder))
    if not studies:
        typer.echo(write_index(found, HOME))


def _folders_of(name: str, results: str) -> list[Path]:
    """Return the folder that is named, or all in studies/ of the study of that name."""
    if Path(name).is_dir():
        return [Path(name)]
    if Path(name).name != name:  # a path, to nothing
        return []
    if found := [path.parent for path in HOME.glob(f"{name}/{results}")]:
        return found
    from prefixkit.lab.study.results import read_results

    # low-data-* is the start of low-data-to-text too
    return [path.parent for path in HOME.glob(f"{name}-*/{results}") if read_results(path).study.name == name]


def _folder_name(study: str, size: str, recipe: str | None, overrides: list[str]) -> str:
    """Name a folder so that what was run with other settings stays where it is."""
    changed = hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:6] if overrides else ""
    return "-".join(filter(None, (study, Path(recipe).stem if recipe else "", size, changed)))
