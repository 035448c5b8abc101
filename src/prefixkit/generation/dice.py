"""Choosing the next token with dice that belong to the row, not to the process.

Each text has its own random numbers, one per token, drawn before generation starts. So a text depends on the
seed and on its place in the list of prompts alone: not on torch's global generator (which is neither read nor
changed), not on the batch it shares, not on other threads. Systems compared on the same seed meet the same
dice.

A token is chosen by inverting the cumulative distribution at the row's number, which is an exact sample. The
nucleus (Holtzman et al., 2020, §3.1) is looked for among the likeliest tokens first; sorting a whole
vocabulary per step costs more than a small model's forward pass.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from prefixkit.config import GenerationConfig
from prefixkit.errors import ModelError
from prefixkit.seeding import derive

#: Likeliest tokens a nucleus is looked for in before more are sorted.
_LIKELIEST = 256
#: Probabilities that are sampled from at a time.
_AT_ONCE = 1_000_000


def roll(seed: int, places: Sequence[int], tokens: int) -> Float[Tensor, "b t"]:
    """Return random numbers in [0, 1), one per text and token.

    Args:
        seed: the caller's seed.
        places: each text's place in the caller's list of prompts.
        tokens: numbers per text.
    """
    rows = []
    for place in places:
        generator = torch.Generator().manual_seed(derive(seed, f"generation/{place}"))
        rows.append(torch.rand(tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)  # [b, t]


def choose(
    logits: Float[Tensor, "b v"], dice: Float[Tensor, "b"], *, top_k: int | None = None, top_p: float = 1.0
) -> Int[Tensor, "b"]:
    """Return one token per row, sampled from the softmax of the logits, cut by top-k and then by top-p.

    Args:
        logits: of the next token, temperature applied.
        dice: a number in [0, 1) per row.
        top_k: sample from this many likeliest tokens.
        top_p: sample from the smallest set of tokens with this probability mass.
    """
    rows = max(1, _AT_ONCE // logits.shape[1])
    if len(logits) > rows:  # sums in float64 of a large batch would be the largest thing in memory
        parts = zip(logits.split(rows), dice.split(rows), strict=True)
        return torch.cat([choose(*part, top_k=top_k, top_p=top_p) for part in parts])
    weights = logits.softmax(dim=1)  # [b, v]
    if top_k is not None:
        kept, tokens = weights.topk(min(top_k, weights.shape[1]))  # [b, k]
        kept = cut(kept / kept.sum(dim=1, keepdim=True), top_p)
        return tokens.gather(1, _invert(kept, dice))[:, 0]
    if top_p < 1:
        return _choose_from_nucleus(weights, dice, top_p, _LIKELIEST)
    return _invert(weights, dice)[:, 0]


def cut(weights: Float[Tensor, "b k"], top_p: float) -> Float[Tensor, "b k"]:
    """Return weights, given likeliest first, with those outside the nucleus set to 0.

    A token is inside if the likelier ones together have less than `top_p`.
    """
    before = weights.cumsum(dim=1) - weights  # [b, k]
    return weights.masked_fill(before >= top_p, 0)


def _choose_from_nucleus(
    weights: Float[Tensor, "b v"], dice: Float[Tensor, "b"], top_p: float, count: int
) -> Int[Tensor, "b"]:
    """Choose among the `count` likeliest tokens; rows whose nucleus is larger look at eight times as many."""
    kept, tokens = weights.topk(min(count, weights.shape[1]))  # [b, k]
    chosen = tokens.gather(1, _invert(cut(kept, top_p), dice))[:, 0]
    is_larger = kept.sum(dim=1) < top_p  # [b]
    if count < weights.shape[1] and is_larger.any():
        chosen[is_larger] = _choose_from_nucleus(weights[is_larger], dice[is_larger], top_p, 8 * count)
    return chosen


def _invert(weights: Float[Tensor, "b k"], dice: Float[Tensor, "b"]) -> Int[Tensor, "b 1"]:
    """Return the index at which the cumulative weight passes the row's number, a share of the total."""
    total = weights.double().cumsum(dim=1)  # [b, k]
    mark = dice.to(total)[:, None] * total[:, -1:]  # [b, 1]
    index = (total <= mark).sum(dim=1, keepdim=True)  # [b, 1]
    # Rounding may put the mark on the total itself: then take the last token that has any weight.
    return index.minimum((total < total[:, -1:]).sum(dim=1, keepdim=True))


def penalise(
    scores: Float[Tensor, "b v"], ids: Int[Tensor, "b s"], is_text: Bool[Tensor, "b s"], penalty: float
) -> Float[Tensor, "b v"]:
    """Make tokens that occur in the row's text less likely (Keskar et al., 2019, §4.1).

    Padding is no text: with the end-of-text token as padding, counting it would keep padded rows from ending.
    """
    counted = torch.zeros_like(scores, dtype=torch.int8)  # [b, v]
    seen = counted.scatter_reduce_(1, ids, is_text.to(torch.int8), "amax") != 0
    return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


class TokenChooser(LogitsProcessor):
    """Makes transformers' greedy decoding take the tokens our dice choose.

    Args:
        settings: temperature, top_p, top_k and repetition_penalty.
        dice: a number per row and new token.
        is_text: true where the prompts have text, false on padding; its width is where new tokens begin.
    """

    def __init__(self, settings: GenerationConfig, dice: Float[Tensor, "b n"], is_text: Bool[Tensor, "b s"]) -> None:
        self.settings, self.dice, self.is_text = settings, dice, is_text

    def __call__(self, input_ids: Int[Tensor, "b s"], scores: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        """Return scores whose maximum is the chosen token; those given, which are the step's own, are overwritten.

        Raises:
            ModelError: the logits hold NaN or infinity.
        """
        highest = scores.amax(dim=1, keepdim=True)  # [b, 1]
        if not torch.isfinite(highest).all():
            raise ModelError(
                "the model's logits are NaN or infinite: the artefact or the base model is damaged, or the dtype too "
                "narrow; try model.dtype=float32"
            )
        step = input_ids.shape[1] - self.is_text.shape[1]
        if self.settings.repetition_penalty > 1:
            is_text = torch.nn.functional.pad(self.is_text, (0, step), value=True)
            scores = penalise(scores, input_ids, is_text, self.settings.repetition_penalty)
            highest = scores.amax(dim=1, keepdim=True)
        if self.settings.temperature == 0:
            return scores
        logits = scores.sub_(highest).div_(self.settings.temperature)  # highest first: no overflow however cold
        chosen = choose(logits, self.dice[:, step], top_k=self.settings.top_k, top_p=self.settings.top_p)
        return scores.fill_(-torch.inf).scatter_(1, chosen[:, None], 0.0)
