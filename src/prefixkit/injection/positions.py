"""Where the text stands: positions of its tokens, moved past the prefix, and the context they must fit."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from prefixkit.compat import cache_of, cache_room
from prefixkit.errors import InjectionError
from prefixkit.models.inspect import Anatomy


def text_positions(
    call: dict[str, Any], offsets: Int[Tensor, "n"] | Int[Tensor, "n t"], inputs: Tensor, anatomy: Anatomy
) -> Int[Tensor, "*axes rows t"]:
    """Return the text's positions behind each row's prefix; refuse those the model was not made for.

    Args:
        call: the keyword arguments of the model's forward.
        offsets: one for all rows, or one per row, or per token of each.
        inputs: `[b, t, ...]`, what the model reads.
        anatomy: its limits.

    Raises:
        InjectionError: see the checks below.
    """
    (batch, tokens), past = inputs.shape[:2], past_tokens(call)
    check_mask(call, past + tokens)
    positions = moved_positions(call, offsets, batch=batch, tokens=tokens, from_mask=anatomy.counts_by_mask)
    most = past + tokens + int(offsets.max())
    is_given = call.get("position_ids") is not None
    check_context(positions, anatomy.context_tokens, None if is_given else most)
    check_rope(positions, anatomy.rope_switch, past)
    check_scale(anatomy.scale_switch, most)
    return positions


def moved_positions(
    call: dict[str, Any], offsets: Int[Tensor, "n"] | Int[Tensor, "n t"], *, batch: int, tokens: int, from_mask: bool
) -> Int[Tensor, "*axes rows t"]:
    """Return the position ids of one forward call, moved by each row's offset.

    Args:
        call: the keyword arguments of the model's forward.
        offsets: one for all rows, or one per row, or per token of each.
        batch: rows of the call.
        tokens: tokens per row of the call.
        from_mask: the model counts default positions by its attention mask (OPT), not by columns.

    Returns:
        `[b, t]`, or `[1, t]` where all rows have the same; `[a, b, t]` where the model counts along several axes
        (Qwen2-VL: time, height, width), all of which are moved.

    Raises:
        InjectionError: the positions given do not match the batch.
    """
    given: Tensor | None = call.get("position_ids")
    device = _device(call)
    if given is None:
        given = _default_positions(call, tokens, from_mask).to(device)
    if given.dim() not in (2, 3) or given.shape[-2] not in (1, batch):
        raise InjectionError(
            f"position_ids: expected shape [{batch}, {tokens}] or [1, {tokens}], got {list(given.shape)}"
        )
    each = offsets if offsets.dim() == 2 else offsets[:, None]
    return given + each.to(given.device)  # [1 or b, t], or [a, 1 or b, t]


def check_context(positions: Int[Tensor, "*axes n t"], context_tokens: int | None, most: int | None) -> None:
    """Refuse a text that, after the prefix, runs past the positions the model was made for.

    Args:
        positions: the moved position ids.
        context_tokens: the model's limit; None for no limit.
        most: a bound on the positions known without looking at them, if one is (spares a device synchronisation).

    Raises:
        InjectionError: a position lies beyond the limit.
    """
    if context_tokens is None or (most is not None and most <= context_tokens):
        return
    needed = int(positions.max()) + 1
    if needed > context_tokens:
        raise InjectionError(
            f"prefix and text need {needed} positions, the base model has {context_tokens}; "
            "shorten the text or the prefix"
        )


def check_rope(positions: Int[Tensor, "*axes n t"], rope_switch: int | None, past: int) -> None:
    """Refuse a forward pass on both sides of the position at which all rotary angles change (longrope).

    The longest row decides for all of them, and a cache keeps the angles its keys were turned by: a row would not be
    read as it is alone, nor as it is without a cache.

    Args:
        positions: the moved position ids.
        rope_switch: `Anatomy.rope_switch`.
        past: tokens in the cache.

    Raises:
        InjectionError: some rows, or the cache, are on one side of it and some on the other.
    """
    if rope_switch is None:
        return
    axes = positions.reshape(-1, *positions.shape[-2:])  # [a, n, t]
    is_beyond = axes.amax(dim=(0, 2)) >= rope_switch  # [n]
    crosses = past > 0 and bool((is_beyond & (axes.amin(dim=(0, 2)) <= rope_switch)).any())
    if crosses or bool(is_beyond.any() != is_beyond.all()):
        what = "this text crosses it with a cache" if crosses else "some rows of this batch are longer, some are not"
        raise InjectionError(
            f"the base model's rotary embedding (longrope) changes for all tokens at once beyond {rope_switch} "
            f"positions, the prefix's included, and {what}; "
            + ("set use_cache=False" if crosses else "give rows of one side at a time")
        )


def check_scale(scale_switch: int | None, most: int) -> None:
    """Refuse a text so long that attention is scaled by a count of tokens which leaves the prefix out (Llama 4).

    Args:
        scale_switch: `Anatomy.scale_switch`.
        most: tokens of the text and of the longest prefix.

    Raises:
        InjectionError: it is.
    """
    if scale_switch is not None and most >= scale_switch:
        raise InjectionError(
            f"from {scale_switch} tokens on the base model scales its attention by their number and leaves the "
            f"prefix out; prefix and text have {most}: shorten them, or set attn_temperature_tuning=False"
        )


def check_mask(call: dict[str, Any], most: int) -> None:
    """Refuse an attention mask with more columns than there are tokens, which the model would cut at its end.

    Columns for the whole room of a static cache are taken.

    Args:
        call: the keyword arguments of the model's forward.
        most: tokens in the cache and of the call.

    Raises:
        InjectionError: it has; perhaps columns for the prefix, as PEFT wants them.
    """
    mask, room = call.get("attention_mask"), cache_room(cache_of(call))
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > most and mask.shape[1] != room:
        raise InjectionError(
            f"attention_mask has {mask.shape[1]} columns for {most} tokens; give one per token of text, none for the "
            "prefix"
        )


def past_tokens(call: dict[str, Any]) -> int:
    """Return how many tokens the cache of a call already holds."""
    cache = cache_of(call)
    return 0 if cache is None else int(cache.get_seq_length())


def _default_positions(call: dict[str, Any], tokens: int, from_mask: bool) -> Int[Tensor, "n t"]:
    """What the model itself would take when no position ids are given."""
    past = past_tokens(call)
    mask = call.get("attention_mask")
    if from_mask and mask is not None:
        counted: Tensor = (torch.cumsum(mask, dim=1) * mask - 1).long()
        return counted[:, past : past + tokens]
    return torch.arange(past, past + tokens)[None]


def _device(call: dict[str, Any]) -> torch.device:
    inputs = call.get("input_ids")
    if inputs is None:
        inputs = call["inputs_embeds"]
    device: torch.device = inputs.device
    return device
