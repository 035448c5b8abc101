"""The words of `prefixkit inspect`: a survey of a model, as lines for people and as JSON."""

from dataclasses import asdict
from typing import Any

import torch

from prefixkit.config import Placement
from prefixkit.lab.pages.facts import format_bytes
from prefixkit.models.inspect import Kind
from prefixkit.models.survey import Stack, Survey

STACK_NAMES = {
    Placement.DECODER_SELF: "decoder self-attention",
    Placement.ENCODER_SELF: "encoder self-attention",
    Placement.CROSS: "cross-attention",
}
_KINDS = {Kind.DECODER: "decoder-only", Kind.ENCODER: "an encoder", Kind.ENCODER_DECODER: "an encoder-decoder"}


def describe(survey: Survey) -> list[tuple[str, str]]:
    """Return what was found as pairs of a name and a sentence."""
    n, each = survey.num_virtual_tokens, survey.numbers_per_token
    kind = f"{survey.family}, {_KINDS[survey.kind]} ({survey.architecture})"
    lines = [
        ("model", f"{survey.model} can take a prefix"),
        (
            "family",
            f"{kind}, {survey.base_parameters:,} parameters",
        ),
        ("attention", " or ".join(survey.attention)),
    ]
    for stack in survey.stacks:
        lines.append((STACK_NAMES[stack.placement], _geometry(stack, is_only=len(survey.stacks) == 1)))
    lines += [
        ("one virtual token", _size(survey, 1)),
        (f"{n} virtual tokens", f"{_size(survey, n)}; {100 * n * each / survey.base_parameters:.2g}% of the model"),
        ("context", _context(survey)),
        ("sliding windows", "; ".join(filter(None, map(_windows, survey.stacks))) or "none"),
        *_rope(survey.rope_switch),
        ("looked at", "configuration and weights: it cannot run without them" if survey.is_loaded
         else "the configuration alone; no weights were read"),
    ]  # fmt: skip
    return lines


def to_json(survey: Survey) -> dict[str, Any]:
    """Return what was found, with the numbers derived from it."""
    n = survey.num_virtual_tokens
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    sizes = {name: survey.bytes_per_token(dtype) for name, dtype in formats.items()}
    return {"can_take_prefix": True} | asdict(survey) | {
        "parameters_per_virtual_token": survey.numbers_per_token,
        "bytes_per_virtual_token": sizes,
        "prefix_parameters": n * survey.numbers_per_token,
        "prefix_bytes": {name: n * size for name, size in sizes.items()},
        "positions_left": survey.positions_left,
    }  # fmt: skip


def _geometry(stack: Stack, *, is_only: bool) -> str:
    heads, kv, size = ("/".join(map(str, each)) for each in (stack.query_heads, stack.kv_heads, stack.head_dim))
    shared = f"{heads} heads" if heads == kv else f"{heads} query heads on {kv} KV heads"
    share = "" if is_only else f"; {stack.numbers_per_token:,} parameters per virtual token"
    return f"{stack.layers} layers, {shared} of size {size}{share}"


def _size(survey: Survey, tokens: int) -> str:
    full, half = (format_bytes(tokens * survey.bytes_per_token(dtype)) for dtype in (torch.float32, torch.bfloat16))
    return f"{tokens * survey.numbers_per_token:,} parameters: {full} in float32, {half} in bfloat16"


def _context(survey: Survey) -> str:
    left, tokens = survey.positions_left, f"{survey.num_virtual_tokens:,} virtual tokens"
    if survey.context_tokens is None or left is None:
        return "no limit of positions"
    if left <= 0:
        return f"{survey.context_tokens:,} positions: too few for {tokens} and text"
    return f"{survey.context_tokens:,} positions, {left:,} left for text after {tokens}"


def _rope(switch: int | None) -> list[tuple[str, str]]:
    if switch is None:
        return []
    switches = f"change for a whole batch beyond {switch:,} positions (longrope)"
    return [("rotary angles", f"{switches}: batches and cached texts must stay on one side of it, the prefix counted")]


def _windows(stack: Stack) -> str:
    if not stack.windowed_layers:
        return ""
    layers = "all" if len(stack.windowed_layers) == stack.layers else f"{len(stack.windowed_layers)} of {stack.layers}"
    tokens = "/".join(f"{window:,}" for window in stack.window_tokens)
    return f"{tokens} tokens in {layers} layers: the window slides over text only, the prefix stays visible"
