"""Watching a frozen model read a prefix: how much of each layer's attention goes to each virtual token.

No implementation need give its attention weights away for this. Attention is a weighted sum of values,

    output = sum_i a_i P_V[i] + sum_j b_j V[j]            weights a_i on the prefix, b_j on the text

so the layer's own attention function is asked once more, with values that tell: the i-th unit vector for virtual
token i, and 0 for all text. What comes out is ``a``, exactly, under grouped queries, windows, soft-capping, sinks
and biases alike, in sdpa as in eager. With a gate, the function's own blending has scaled ``a`` by it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface

from prefixkit.compat import hidden_score
from prefixkit.injection.attention import NAMES, Output, attend
from prefixkit.injection.slots import BANK, slot_of
from prefixkit.prefix import Bank, SiteBank


@dataclass(frozen=True)
class Reading:
    """What one attention layer did in one call.

    Attributes:
        site: index of the layer's site in the geometry.
        shares: attention weight on each virtual token; with a gate, times the gate.
        visible: how many keys of the text each query may see; in cross-attention, of the encoder's text.
        key_norms: length of the text's keys, mean over KV heads: in a decoder's self-attention those of the call's own
            tokens (`s` is `t`), elsewhere those of the whole text, padding included.
        value_norms: likewise of their values.
    """

    site: int
    shares: Float[Tensor, "b h t p"]
    visible: Int[Tensor, "b t"]
    key_norms: Float[Tensor, "b s"]
    value_norms: Float[Tensor, "b s"]


Take = Callable[[Reading], None]

#: The layers being watched, and who is told. Several models may be watched at once.
_watched: dict[nn.Module, Take] = {}


@contextmanager
def recording(layers: Sequence[nn.Module], take: Take) -> Iterator[None]:
    """Tell `take` of every call of these attention layers; the model computes what it computes without.

    Args:
        layers: attention layers, of any placement, of a model to which a prefix is attached.
        take: called once per layer and forward pass; not for layers without virtual tokens.
    """
    _watched.update(dict.fromkeys(layers, take))
    for name in NAMES.values():
        AttentionInterface.register(name, _attend_and_tell)
    try:
        yield
    finally:
        for layer in layers:
            del _watched[layer]
        if not _watched:
            for name in NAMES.values():
                AttentionInterface.register(name, attend)


def _attend_and_tell(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Output:
    if module in _watched:
        reading = _read(module, query, key, value, attention_mask, options)
        if reading is not None:
            _watched[module](reading)
    return attend(module, query, key, value, attention_mask, **options)


@torch.no_grad()
def _read(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Reading | None:
    slot = slot_of(module)
    prefix = slot.read(key.shape[0], options.get(BANK)).to(key.device, key.dtype)  # rounded as the model reads it
    if prefix.length == 0:
        return None
    precise = torch.promote_types(key.dtype, torch.float32)
    bank: Bank | None = options.get(BANK) or slot.current.bank
    assert bank is not None  # or reading the slot had failed
    if options.get("position_bias") is not None:  # T5's; sdpa takes it in the number format of the queries only
        options = options | {"position_bias": options["position_bias"].to(precise)}
    parts = []
    for telling in _telling(prefix.to(key.device, precise), width=value.shape[3]):
        part, _ = attend(
            module,
            query.to(precise),
            key.to(precise),
            torch.zeros_like(value, dtype=precise),
            mask,
            **options | {BANK: _with_site(bank, slot.site, telling)},
        )
        parts.append(part)  # [b, t, h, d]
    shares = torch.cat(parts, dim=3)[..., : prefix.length].transpose(1, 2)  # [b, h, t, p]
    tokens = query.shape[2]
    text = slice(-tokens, None) if slot.is_causal else slice(None)  # without what a cache holds
    keys, values = (each[:, :, text].to(precise) for each in (key, value))  # [b, g, s, d]
    return Reading(slot.site, shares, _visible(mask, key, tokens), keys.norm(dim=3).mean(1), values.norm(dim=3).mean(1))


def _with_site(bank: Bank, number: int, site: SiteBank) -> Bank:
    """Return a bank for the layer of one site alone, which reads something else, row by row."""
    return Bank((*bank.entries[:number], site, *bank.entries[number + 1 :]), bank.offsets, bank.beside)


def _telling(prefix: SiteBank, width: int) -> Iterator[SiteBank]:
    """Yield the prefix with unit vectors for values, as many at a time as a value has numbers."""
    n, heads, length, _ = prefix.key.shape
    for start in range(0, length, width):
        units = torch.eye(length, dtype=prefix.key.dtype, device=prefix.key.device)[:, start : start + width]
        units = nn.functional.pad(units, (0, width - units.shape[1]))  # [p, d]
        yield replace(prefix, value=units.expand(n, heads, -1, -1))


def _visible(mask: Tensor | None, key: Tensor, tokens: int) -> Int[Tensor, "b t"]:
    """Count the text tokens each query may see."""
    batch, _, keys, _ = key.shape
    if mask is None:
        return torch.full((batch, tokens), keys, device=key.device)
    seen = mask if mask.dtype == torch.bool else mask > hidden_score(mask.dtype) / 2
    return seen[:, 0].sum(dim=-1).expand(batch, tokens)
