"""The slow reference: attention with a prefix as loops over rows, heads and queries, sharing nothing with ours.

It stands in transformers' registry under its own name. Which keys a query may see comes from the model's own boolean
mask; the prefix's states are put in front of the keys one row at a time; the softmax is written out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from prefixkit.prefix import PrefixStates, SiteStates

NAME = "slow_reference"


def _mask(*args: Any, **options: Any) -> Tensor:
    return sdpa_mask(*args, **options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


@contextmanager
def reference(
    model: PreTrainedModel, modules: Sequence[torch.nn.Module], rows: Sequence[PrefixStates | None]
) -> Iterator[None]:
    """Let a model read one prefix (or none) per row; the caller gives the positions.

    A batch of `k * len(rows)` rows, as beams make it, reads each prefix `k` times in a row.
    """
    site_of = {module: index for index, module in enumerate(modules)}

    def attend(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        batch, heads, _, dim = query.shape
        scale = dim**-0.5 if options.get("scaling") is None else options["scaling"]
        bias, softcap, sinks = options.get("position_bias"), options.get("softcap"), options.get("s_aux")
        out = []
        for b in range(batch):
            states = rows[b * len(rows) // batch]
            site: SiteStates | None = None if states is None else states.sites[site_of[module]]
            for h in range(heads):
                g = h * key.shape[1] // heads
                for t in range(query.shape[2]):
                    seen = torch.ones(key.shape[2], dtype=torch.bool)
                    if mask is not None:
                        seen = mask.expand(batch, heads, -1, -1)[b, h, t]
                    scores = (key[b, g] @ query[b, h, t]) * scale
                    if softcap is not None:
                        scores = softcap * torch.tanh(scores / softcap)
                    if bias is not None:
                        scores = scores + bias.expand(batch, -1, -1, -1)[b, h, t]
                    scores, values = scores[seen], value[b, g][seen]
                    if site is not None and site.length:
                        early = (site.key[g] @ query[b, h, t]) * scale
                        if softcap is not None:
                            early = softcap * torch.tanh(early / softcap)
                        scores, values = torch.cat([early, scores]), torch.cat([site.value[g], values])
                    if len(scores) == 0:  # padding that sees nothing; what it gets is never read
                        out.append(value[b, g].mean(0))
                        continue
                    largest = scores.max()
                    weights = (scores - largest).exp()
                    total = weights.sum() + (0 if sinks is None else (sinks.reshape(-1)[h] - largest).exp())
                    out.append((weights[:, None] * values).sum(0) / total)
        return torch.stack(out).view(batch, heads, query.shape[2], value.shape[3]).transpose(1, 2), None

    implementation = model.config._attn_implementation
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
