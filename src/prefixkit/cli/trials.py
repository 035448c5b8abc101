"""Options of commands that start many trials: where, how many at a time, with what."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from prefixkit.lab.sweep.trial import Runner


class Where(StrEnum):
    """Where trials run."""

    LOCAL = "local"
    RAY = "ray"


On = Annotated[Where, typer.Option("--on", help="Where trials run.")]
Workers = Annotated[int, typer.Option("--workers", help="Trials at a time on this machine.")]
Address = Annotated[str | None, typer.Option("--address", help="Of a Ray cluster; this machine if left out.")]
Cores = Annotated[int, typer.Option("--cores", help="Cores of each trial on Ray.")]
Gpus = Annotated[float, typer.Option("--gpus", help="GPUs of each trial on Ray.")]


def runner_of(where: Where, *, workers: int, address: str | None, cores: int, gpus: float) -> "Runner":
    """Return what runs trials as the options say.

    Raises:
        ConfigError: an option is out of range, or Ray is not installed or cannot be reached.
    """
    from prefixkit.lab.sweep.local import on_this_machine
    from prefixkit.lab.sweep.on_ray import on_ray

    return on_this_machine(workers) if where is Where.LOCAL else on_ray(address, cores=cores, gpus=gpus)
