"""`prefixkit estimate`: what a recipe's training costs on this machine, and on another."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from prefixkit.lab.cost import Cost


def estimate(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, such as prefix.num_virtual_tokens=50.")
    ] = None,
    flops: Annotated[
        float | None, typer.Option("--flops", help="FLOP/s of other hardware, such as 300e12, to say its time too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Take a few of a recipe's steps, and tell what training it costs in time and memory."""
    from prefixkit.config import load_recipe
    from prefixkit.errors import ConfigError
    from prefixkit.lab.cost import estimate_run

    if flops is not None and not flops > 0:
        raise ConfigError(f"--flops: expected more than 0 FLOP/s, such as 300e12, got {flops:g}")
    settings = load_recipe(recipe, overrides or [])
    base, cost = estimate_run(settings)
    derived = {"reached": cost.reached, "training_seconds": cost.training_seconds}
    derived |= {} if flops is None else {"training_seconds_at": cost.seconds_at(flops)}
    if as_json:
        typer.echo(json.dumps(asdict(cost) | derived))
        return
    lines = {
        "step": f"{cost.texts} texts, {cost.tokens:.0f} tokens, {cost.flops / 1e9:.0f} GFLOP",
        "machine": f"{cost.rate / 1e9:.0f} GFLOP/s in products of {base.id}'s shapes, of which a step reaches "
        f"{cost.reached:.0%}",
        "training": f"{cost.steps} steps in about {_time(cost.training_seconds)}, {cost.seconds:.2f} s each; held-out "
        "losses and the evaluation come on top",
        "memory": f"{cost.peak / 1e9:.1f} GB at most{less_memory(cost)}",
        "trained": f"{cost.trained:,} numbers",
    }
    if flops is not None:
        lines["elsewhere"] = (
            f"about {_time(cost.seconds_at(flops))} at {flops / 1e12:g} TFLOP/s, by the same share at best"
        )
    for name, said in lines.items():
        typer.echo(f"{name:10} {said}")


def less_memory(cost: "Cost") -> str:
    """Say what gradient checkpointing would take, if the model can do that and it would be less."""
    if cost.peak_checkpointed >= cost.peak:
        return ""
    return f", {cost.peak_checkpointed / 1e9:.1f} GB with train.gradient_checkpointing=true"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
