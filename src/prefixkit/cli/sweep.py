"""`prefixkit sweep`: one recipe under many settings, each with several seeds."""

import json
from pathlib import Path
from typing import Annotated

import typer

from prefixkit.cli.trials import Address, Cores, Gpus, On, Where, Workers, runner_of


def sweep(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")],
    grid: Annotated[
        list[str] | None, typer.Argument(help="Settings and their values, such as prefix.num_virtual_tokens=10,20,50.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Seeds per combination.")] = 1,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder; sweeps/<name> if left out.")] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="What to compare; held-out loss, or accuracy, if left out.")
    ] = None,
    where: On = Where.LOCAL,
    workers: Workers = 1,
    address: Address = None,
    cores: Cores = 1,
    gpus: Gpus = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the trials and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Run every combination of settings, each with several seeds; started again, it goes on where it was."""
    from prefixkit.config import load_recipe
    from prefixkit.errors import ConfigError, SweepError
    from prefixkit.processes import count

    if count() > 1:
        raise ConfigError("a sweep starts its own processes; start it without torchrun or accelerate launch")
    name = load_recipe(recipe).name
    home = (folder or Path("sweeps") / name).absolute()  # for workers of Ray, which are elsewhere
    from prefixkit.lab.sweep.plan import plan

    trials = plan(recipe, grid or [], seeds=seeds, folder=home)
    if dry_run:
        for trial in trials:
            typer.echo(trial.label)
        return
    from prefixkit.cli.rendering import print_groups, progress
    from prefixkit.lab.sweep.run import run_sweep, sum_up, summary

    runner = runner_of(where, workers=workers, address=address, cores=cores, gpus=gpus)
    with progress() as report:
        results = run_sweep(
            trials, home, runner, report=lambda done, total, words: report("trials", done, total, words)
        )
    learns_labels = any("accuracy" in result.scores for result in results)
    metric = metric or ("accuracy" if learns_labels else "heldout_nll")
    groups = sum_up(results, metric)
    if as_json:
        typer.echo(json.dumps({"folder": str(home), "groups": summary(groups, metric)}))
    else:
        print_groups(groups, metric, home)
    failed = [result for result in results if result.error is not None]
    if failed:
        first = failed[0]
        raise SweepError(
            f"{len(failed)} of {len(results)} trials failed; the first, {first.trial.label}: {first.error}"
        )
