"""`prefixkit show`: what an artefact is."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from prefixkit.prefix import Delta


def _delta(delta: "Delta") -> str:
    settings = ", ".join(f"{name} {value}" for name, value in delta.settings.items() if value is not None)
    return f"{delta.num_parameters:,} numbers" + (f", {settings}" if settings else "")


def show(
    folder: Annotated[Path, typer.Argument(help="An artefact, or a trained run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON.")] = False,
) -> None:
    """Show an artefact: geometry, size, training, scores. Loading it checks it."""
    from prefixkit.prefix import Prefix

    prefix = Prefix.load(folder)
    card = prefix.card
    if as_json:
        typer.echo(json.dumps(card.to_json()))
        return
    lengths = sorted(set(prefix.states.lengths))
    site = card.sites[0]
    lines = {
        "base model": f"{card.base.id}  (fingerprint {(card.base.fingerprint or 'none')[:12]})",
        "virtual tokens": "-".join(map(str, lengths)) + f" in {sum(n > 0 for n in prefix.states.lengths)} layers",
        "geometry": f"{len(card.sites)} layers, {site.query_heads} query heads, "
        f"{site.kv_heads} KV heads of {site.head_dim}",
        "size": f"{prefix.num_parameters:,} numbers, gate {'yes' if prefix.states.has_gate else 'no'}",
        "parts": ", ".join(prefix.parts) or "none",
        **{str(delta.method): _delta(delta) for delta in prefix.deltas},
        "costs": f"{prefix.flops_per_token:,} operations per token of text, {prefix.nbytes:,} bytes in memory",
        "head": "none"
        if card.head is None
        else f"{card.head.kind}, reads {card.head.pooling}, {len(card.head.labels)} labels: "
        + ", ".join(card.head.labels),
        "text starts at": f"position {card.position_offset}",
        "content hash": card.content_hash[:12],
        "licence": card.licence or "not stated",
    }
    if card.training is not None:
        beside = f", together with {' and '.join(card.turned_off)}, turned off since" if card.turned_off else ""
        lines["trained"] = (
            f"{card.training.steps} steps, seed {card.training.seed}, {card.training.trained_parameters:,} parameters"
            + beside
        )
    lines |= {key: f"{value:.4g}" for key, value in card.scores.items() if "." not in key}
    for key, value in lines.items():
        typer.echo(f"{key:22} {value}")
