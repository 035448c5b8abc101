"""Attention to prefix and text computed apart: what `attention.attend` computes for one new token, copying no cache.

A token that is generated is one query to all keys so far. Putting the prefix's keys before them would copy the whole
cache for it, in every layer. As He et al. (2022), Eq. 7 write it, nothing need be put together: with

    λ = sum exp(q P_K^T) / (sum exp(q P_K^T) + sum exp(q K^T))                    the prefix's share of the softmax

attention to both is attention to each, weighted,

    softmax(q [P_K; K]^T) [P_V; V] = λ softmax(q P_K^T) P_V + (1 - λ) softmax(q K^T) V

and the second term is torch's own attention to the text, as if there were no prefix. Engines put parts of one attention
together in the same way, by the logarithms of their sums (Flash-Decoding; cascade inference).
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache

from prefixkit.compat import attention_and_logsumexp
from prefixkit.prefix import SiteBank

#: Keys of a cache, in numbers, from which copying them costs more than the few more steps here: on two AVX2 cores, 20
#: virtual tokens, 8 x 3 heads of 64, 0.4 against 0.3 ms for 64 tokens (98,000), 1.0 against 2.9 ms for 300 (460,000).
WORTHWHILE = 250_000
#: Options of an attention function that change what is computed; whatever else a model hands it, sdpa ignores.
_CHANGING = ("position_bias", "softcap")


def can_attend_apart(
    query: Tensor, key: Tensor, value: Tensor, prefix: SiteBank, mask: Tensor | None, options: Mapping[str, Any]
) -> bool:
    """Whether this is one new token per row behind long texts, on a processor, with no gradient and nothing special."""
    return (
        query.shape[2] == 1
        and key.numel() >= WORTHWHILE
        and (prefix.mask is None or prefix.mask.dim() == 2)
        and (mask is None or mask.shape[1] == 1)  # heads that see different tokens are not asked together
        and query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not options.get("dropout")
        and all(options.get(name) is None for name in _CHANGING)
        and isinstance(options.get("cache"), Cache | None)  # not one in pages
    )


def attend_apart(
    query: Float[Tensor, "b h 1 d"],
    key: Float[Tensor, "b g s d"],
    value: Float[Tensor, "b g s d"],
    prefix: SiteBank,
    mask: Tensor | None,
    scale: float | None,
) -> Float[Tensor, "b 1 h d"]:
    """Attend to a prefix and the text.

    Args:
        query: of one token per row.
        key: the text's; read where it lies.
        value: likewise.
        prefix: one for all rows, or one per row.
        mask: of the text, `[b, 1, 1, s]`, boolean or added to the scores; None where all is visible.
        scale: of the scores; None for 1 / sqrt(d).
    """
    b, h, _, d = query.shape
    scale = d**-0.5 if scale is None else scale
    grouped = query.reshape(b, key.shape[1], -1, d)  # [b, g, r, d]: the r heads on one KV head ask like r tokens
    text, text_sum = attention_and_logsumexp(grouped, key, value, mask, scale)  # [b, g, r, d], [b, g, r]
    precise = text_sum.dtype
    scores = grouped.to(precise) @ prefix.key.to(precise).transpose(2, 3) * scale  # [b, g, r, p]
    if prefix.mask is not None:
        scores = scores.masked_fill(~prefix.mask[:, None, None, :], -torch.inf)
    total = torch.logaddexp(text_sum, scores.logsumexp(dim=3))[..., None]  # [b, g, r, 1], of both together
    output = text * (text_sum[..., None] - total).exp() + (scores - total).exp() @ prefix.value.to(precise)
    return output.to(query.dtype).reshape(b, 1, h, d)
