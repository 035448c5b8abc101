"""How a frozen model reads a prefix: its attention sees the prefix's keys and values before its own.

This is one of the two files to read first (the other is `prefix/encoder.py`: what a prefix is). Li & Liang
(2021), §4.2 put trained activations to the left of the text; with keys and values that is, for every head of
every layer (He et al., 2022, Eq. 5),

    head = softmax(q [P_K; K]^T * scale) [P_V; V]

    query        [b, h, t, d]
    key, value   [b, g, s, d]  ->  [b, g, p + s, d]       P_K, P_V: [b, g, p, d]
    mask         [b, 1, t, s]  ->  [b, 1, t, p + s]       a row sees its own virtual tokens, all of them, always
    bias         [1, h, t, s]  ->  [1, h, t, p + s]       T5's, by distance: a virtual token is at no distance, 0
    output       [b, t, h, d]

transformers asks a registry for the attention function of a model. The functions below stand in that registry
under names of their own, prepend, and call the model's own implementation, so that rotary embedding,
grouped-query attention, soft-capping, sinks, caches and gradient checkpointing stay the model's business.
Masks are made for the text alone: a sliding window slides over text, and never hides the prefix. The same holds
for an encoder's attention and for a decoder's attention to its encoder, where the keys are the encoder's. One new token
at a time, as `generate` has it, nothing is prepended: `apart` comes to the same without copying the cache.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from prefixkit.compat import eager_attention, eager_mask, hidden_score, sdpa_attention, sdpa_mask
from prefixkit.errors import InjectionError
from prefixkit.injection.apart import attend_apart, can_attend_apart
from prefixkit.injection.slots import BANK, slot_of
from prefixkit.prefix import SiteBank

Output = tuple[Tensor, Tensor | None]

#: The model's own implementation -> the name under which ours calls it.
NAMES = {"sdpa": "prefixkit_sdpa", "eager": "prefixkit_eager"}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> Output:
    """Attend to the prefix and the text: what transformers calls in place of the model's implementation.

    Args:
        module: the attention layer that asks.
        query: `[b, h, t, d]`.
        key: `[b, g, s, d]`, the text's, earlier tokens from the cache included.
        value: `[b, g, s, d]`.
        attention_mask: `[b, 1, t, s]`, boolean (sdpa) or added to the scores (eager); None where all is visible.
        options: dropout, scaling and whatever else the model gives its implementation; passed on.

    Returns:
        The output `[b, t, h, d]`, and the attention weights `[b, h, t, p + s]` if the implementation has them.

    Raises:
        InjectionError: nothing is attached to this layer, or a causal layer got no mask.
    """
    slot = slot_of(module)
    own = eager_attention(module) if slot.implementation == "eager" else sdpa_attention
    prefix = slot.read(key.shape[0], options.pop(BANK, None))
    if prefix.length == 0:
        slot.keep(key, value)  # where a soft prompt is being read
        return own(module, query, key, value, attention_mask, **options)
    if attention_mask is None and slot.is_causal:
        raise InjectionError(f"{type(module).__name__} gave no attention mask; a prefix would be masked wrongly")
    prefix = prefix.to(key.device, key.dtype)
    if slot.implementation == "sdpa" and can_attend_apart(query, key, value, prefix, attention_mask, options):
        with_prefix: Output = attend_apart(query, key, value, prefix, attention_mask, options.get("scaling")), None
    else:
        bias = options.get("position_bias")  # [1, h, t, s] -> [1, h, t, p + s]
        longer = {} if bias is None else {"position_bias": nn.functional.pad(bias, (prefix.length, 0))}
        with_prefix = own(
            module,
            query,
            torch.cat([_per_row(prefix.key, key), key], dim=2),  # [b, g, p + s, d]
            torch.cat([_per_row(prefix.value, value), value], dim=2),  # [b, g, p + s, d]
            _with_columns(prefix, attention_mask, key, slot.implementation),  # [b, 1, t, p + s]
            **options | longer | {"is_causal": False},  # the mask says it all; a causal flag would be aligned wrongly
        )
    if prefix.gate is None:
        return with_prefix
    return _blend(own(module, query, key, value, attention_mask, **options), with_prefix, prefix.gate)


def _per_row(states: Float[Tensor, "n g p d"], like: Float[Tensor, "b g s d"]) -> Float[Tensor, "b g p d"]:
    """One prefix for all rows is shared, not copied."""
    return states.expand(like.shape[0], -1, -1, -1)


def _with_columns(prefix: SiteBank, mask: Tensor | None, key: Tensor, implementation: str) -> Tensor | None:
    """Put the prefix's columns before the mask's, [b, 1, t, p + s], in the kind of mask the implementation takes."""
    if mask is None and prefix.mask is None:
        return None  # all is visible
    if mask is None:
        mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
        mask = mask if implementation == "sdpa" else torch.zeros_like(mask, dtype=key.dtype)
    seen = _seen(prefix).to(mask.device)  # [n, 1, t or 1, p]
    rows = max(len(mask), len(seen))  # either may speak for all rows
    columns = seen.expand(rows, *mask.shape[1:3], -1)  # [b, 1, t, p]
    if mask.dtype != torch.bool:
        columns = torch.zeros_like(columns, dtype=mask.dtype).masked_fill(~columns, hidden_score(mask.dtype))
    return torch.cat([columns, mask.expand(rows, -1, -1, -1)], dim=3)


def _seen(prefix: SiteBank) -> Bool[Tensor, "n 1 t p"]:
    """Which virtual tokens a row's tokens see: its own, all of them, or none before an infix."""
    if prefix.mask is None:
        return torch.ones(1, 1, 1, prefix.length, dtype=torch.bool, device=prefix.key.device)
    by_token = prefix.mask if prefix.mask.dim() == 3 else prefix.mask[:, None]  # an infix: [n, t, p]; else [n, 1, p]
    return by_token[:, None]


def _blend(plain: Output, prefixed: Output, gate: Float[Tensor, "n h"]) -> Output:
    """Move from the plain attention to the prefixed one by the gate's share; at gate 0 nothing changes.

    As He et al. (2022), Eq. 7 write prefix tuning, h <- (1 - λ) h + λ Δh, with λ learned per head on top of the
    softmax's own; a start at 0 follows LLaMA-Adapter (Zhang et al., 2023, §3.2).
    """
    share = gate[:, None, :, None]  # [n, 1, h, 1]
    output = plain[0] + share * (prefixed[0] - plain[0])  # [b, t, h, d]
    if plain[1] is None or prefixed[1] is None:
        return output, None
    own = nn.functional.pad(plain[1], (prefixed[1].shape[3] - plain[1].shape[3], 0))  # [b, h, t, p + s]
    share = gate[:, :, None, None]  # [n, h, 1, 1]
    return output, own + share * (prefixed[1] - own)


AttentionInterface.register(NAMES["sdpa"], attend)
AttentionInterface.register(NAMES["eager"], attend)
AttentionMaskInterface.register(NAMES["sdpa"], sdpa_mask)
AttentionMaskInterface.register(NAMES["eager"], eager_mask)
