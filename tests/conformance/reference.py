"""The slow reference: a prefix read by loops, sharing nothing with `prefixkit.injection`.

It stands in transformers' registry under a name of its own and computes attention one row, one head and one query
at a time, from lists of the keys that may be seen. The text's part of the mask is the model's own; the positions are
counted here, from what a family is known to do; nothing is imported from injection or the bank.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from conformance.families import Family
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import PrefixStates

NAME = "conformance_reference"


@dataclass
class _Now:
    """What the running forward pass prepends: per row, the prefix's states or None; and each layer's place in them."""

    rows: Sequence[PrefixStates | None] = ()
    site_of: dict[nn.Module, int] = field(default_factory=dict)


_now = _Now()


def _mask(*args: Any, **options: Any) -> Tensor:
    mask = sdpa_mask(*args, **options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    assert mask is not None
    return mask


def _one_query(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, options: dict[str, Any], sink: Tensor | None
) -> Tensor:
    """Softmax over the keys that are seen: [d], [n, d], [n, d], [n] -> [d]."""
    scaling = options.get("scaling")
    scores = keys @ query * (len(query) ** -0.5 if scaling is None else scaling)  # [n]
    softcap = options.get("softcap")
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + bias
    highest = scores.max()
    weights = (scores - highest).exp()
    weights = weights / (weights.sum() + (0 if sink is None else (sink - highest).exp()))
    return weights @ values


def _attention(module: nn.Module, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, None]:
    with torch._C.DisableTorchFunction():  # casts nothing, so `KeepFloat64` need not look at each of its many steps
        return _loops(module, *tensors, **options)


def _loops(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    batch, heads, queries = query.shape[:3]
    group = heads // key.shape[1]
    sinks, distances = options.get("s_aux"), options.get("position_bias")  # the second is T5's, [1, h, t, s]
    output = []
    for row in range(batch):
        states = _now.rows[row * len(_now.rows) // batch]  # beams repeat rows
        site = None if states is None else states.sites[_now.site_of[module]]
        length = 0 if site is None else site.length
        for head in range(heads):
            g = head // group
            for t in range(queries):
                seen = torch.arange(key.shape[2])
                if attention_mask is not None:
                    seen = attention_mask[row if len(attention_mask) > 1 else 0, 0, t, : key.shape[2]].nonzero()[:, 0]
                bias = key.new_zeros(len(seen)) if distances is None else distances[0, head, t, seen]
                keys, values = key[row, g, seen], value[row, g, seen]
                sink = None if sinks is None else sinks[head]
                one = query[row, head, t] * 0  # padding that sees nothing; what it gets is never read
                if len(seen):
                    one = _one_query(query[row, head, t], keys, values, bias, options, sink)
                if site is not None and length:
                    plain, bias = one, torch.cat([bias.new_zeros(length), bias])  # a prefix is at no distance
                    keys, values = torch.cat([site.key[g], keys]), torch.cat([site.value[g], values])
                    one = _one_query(query[row, head, t], keys, values, bias, options, sink)
                    if site.gate is not None and len(seen):
                        one = plain + site.gate[head] * (one - plain)
                output.append(one)
    shape = (batch, heads, queries, value.shape[3])
    return torch.stack(output).view(shape).transpose(1, 2).contiguous(), None  # [b, t, h, d]


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


@contextmanager
def reading(model: PreTrainedModel, rows: Sequence[PrefixStates | None]) -> Iterator[None]:
    """Let a model read its prefixes by the loops above; positions are the caller's business.

    A batch of `k * len(rows)` rows, as beams make it, reads each prefix `k` times in a row.
    """
    implementation = model.config._attn_implementation
    _now.site_of = {module: index for index, module in enumerate(inspect_model(model).attention)}
    model.set_attn_implementation(NAME)
    _now.rows = rows
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        _now.rows, _now.site_of = (), {}


def positions(family: Family, mask: Tensor | None, rows: int, tokens: int) -> Tensor:
    """The position ids a family counts when it is given none, [b, t]."""
    if mask is not None and family.counts_by_mask:
        return torch.tensor([[sum(row[: i + 1]) * row[i] - 1 for i in range(tokens)] for row in mask.tolist()])
    return torch.tensor([list(range(tokens))] * rows)


def logits(
    model: PreTrainedModel,
    family: Family,
    rows: Sequence[PrefixStates | None],
    offsets: Sequence[int],
    embeds: Tensor,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """What a batch must come to: one prefix (or None) and one offset per row, the text as embeddings `[b, t, e]`."""
    b, t = embeds.shape[:2]
    counted = positions(family, mask, b, t) if position_ids is None else position_ids
    moved = torch.stack([row + offset for row, offset in zip(counted, offsets, strict=True)])
    with reading(model, rows):
        embeds = embeds.clone()  # CTRL scales its input in place
        return model(inputs_embeds=embeds, attention_mask=mask, position_ids=moved, use_cache=False).logits
