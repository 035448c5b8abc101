"""Attention mass: which share of its attention a text token gives the prefix, by layer, head and text length.

    mass = sum_i softmax(q [P_K; K]^T * scale)_i          over the p virtual tokens i; with a gate, times the gate

A query that treated all keys alike would give ``p / (p + s)`` with `s` text tokens in sight: the baseline. As text
grows, the prefix competes with more and more keys, and its mass falls: dilution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefixkit.compat import cache_argument
from prefixkit.config import Placement
from prefixkit.data import Collator, Example
from prefixkit.errors import EvaluationError
from prefixkit.injection import attach
from prefixkit.injection.recording import Reading, recording
from prefixkit.models import Base
from prefixkit.models.inspect import Anatomy, inspect_model
from prefixkit.models.weights import input_device
from prefixkit.prefix import Geometry, Prefix, SiteStates


@dataclass(frozen=True)
class SiteMass:
    """One attention layer. Its numbers are 0 where it has no virtual tokens.

    Attributes:
        heads: mass per query head, mean over the text tokens counted.
        uniform: the baseline, mean over the same tokens.
        by_length: mass at each number of text tokens read so far, from 1, mean over heads and texts.
        uniform_by_length: the baseline there; under a sliding window it stops falling where the window is full.
        tokens: mass on each virtual token, mean over heads and the text tokens counted.
        key_norms: length of each virtual token's key, mean over KV heads, in units of the mean text key's.
        value_norms: likewise of values.
    """

    heads: Float[Tensor, "h"]
    uniform: float
    by_length: Float[Tensor, "s"]
    uniform_by_length: Float[Tensor, "s"]
    tokens: Float[Tensor, "p"]
    key_norms: Float[Tensor, "p"]
    value_norms: Float[Tensor, "p"]

    @property
    def mean(self) -> float:
        """Mass, mean over heads and the text tokens counted."""
        return float(self.heads.mean())


@dataclass(frozen=True)
class AttentionMass:
    """What `measure_mass` found.

    Attributes:
        geometry: names the sites.
        sites: one entry per site.
        texts: how many texts reach each length.
        within: heads, tokens and norms are means over the first `within` tokens of each text.
    """

    geometry: Geometry
    sites: tuple[SiteMass, ...]
    texts: Int[Tensor, "s"]
    within: int


class _Meter:
    """Adds up readings of one site after another, in float64; padding does not count."""

    def __init__(self, prefix: Prefix, most_tokens: int, within: int) -> None:
        self.states, self.within = prefix.states, within
        heads = [site.query_heads for site in prefix.states.geometry.sites]
        self.mass = [torch.zeros(h, most_tokens, dtype=torch.float64) for h in heads]  # [h, s] per site
        self.uniform = torch.zeros(len(heads), most_tokens, dtype=torch.float64)
        self.tokens = [torch.zeros(p, dtype=torch.float64) for p in prefix.states.lengths]
        self.norms = torch.zeros(len(heads), 2, dtype=torch.float64)  # sums over text keys, text values
        self.texts = torch.zeros(most_tokens, dtype=torch.long)
        self.calls = [0] * len(heads)
        self.passes = 0

    def begin(self, is_text: Int[Tensor, "b t"], start: int) -> None:
        """Announce a forward pass over tokens `start`, `start + 1`, ... of each row; 0 marks padding."""
        self.is_text, self.start = is_text.double(), start
        self.span = slice(start, start + is_text.shape[1])
        self.counted = self.is_text * (torch.arange(start, self.span.stop) < self.within)  # [b, t]
        self.texts[self.span] += is_text.sum(0)
        self.passes += 1

    def take(self, reading: Reading) -> None:
        """Add one layer's reading of the pass under way."""
        i, shares = reading.site, reading.shares.cpu().double()  # [b, h, t, p]
        if not shares.isfinite().all():
            raise EvaluationError(
                f"{self.states.geometry.sites[i].name}: an attention weight is no finite number: the prefix is "
                "damaged or the dtype too narrow; try model.dtype=float32"
            )
        self.mass[i][:, self.span] += torch.einsum("bhtp,bt->ht", shares, self.is_text)
        length = shares.shape[3]
        even = length / (length + reading.visible.cpu().double())  # [b, t]
        self.uniform[i, self.span] += (even * self.is_text).sum(0)
        self.tokens[i] += torch.einsum("bhtp,bt->p", shares, self.counted) / shares.shape[1]
        for part, norms in enumerate((reading.key_norms, reading.value_norms)):
            self.norms[i, part] += (norms.cpu().double() * self.counted).sum()
        self.calls[i] += 1

    def result(self) -> AttentionMass:
        """Turn sums into means.

        Raises:
            EvaluationError: a layer with virtual tokens was not run exactly once per pass.
        """
        geometry = self.states.geometry
        for site, length, calls in zip(geometry.sites, self.states.lengths, self.calls, strict=True):
            if calls != (self.passes if length else 0):
                raise EvaluationError(f"{site.name}: read the prefix {calls} times in {self.passes} forward passes")
        counted = self.texts[: self.within].sum()
        sites = []
        for i, states in enumerate(self.states.sites):
            text_keys, text_values = self.norms[i] / counted
            sites.append(
                SiteMass(
                    heads=self.mass[i][:, : self.within].sum(1) / counted,
                    uniform=float(self.uniform[i, : self.within].sum() / counted),
                    by_length=self.mass[i].mean(0) / self.texts,
                    uniform_by_length=self.uniform[i] / self.texts,
                    tokens=self.tokens[i] / counted,
                    key_norms=_lengths(states, "key") / text_keys,
                    value_norms=_lengths(states, "value") / text_values,
                )
            )
        return AttentionMass(geometry, tuple(sites), self.texts, min(self.within, len(self.texts)))


def measure_mass(
    base: Base,
    prefix: Prefix,
    examples: Sequence[Example],
    *,
    within: int,
    batch_size: int = 8,
    chunk_tokens: int = 256,
    on_progress: Callable[[int, int], None] | None = None,
) -> AttentionMass:
    """Measure the attention mass on a prefix while the model reads texts.

    Args:
        base: the frozen model, decoder-only, with nothing attached.
        prefix: what it reads.
        examples: the texts; every token counts, with loss or without.
        within: count the first tokens of each text only, except by length.
        batch_size: most texts per forward pass.
        chunk_tokens: a longer text is read in pieces, so that memory does not grow with its square.
        on_progress: called with the texts read and the texts in all.

    Raises:
        EvaluationError: there is no text, a text does not fit the context, or a weight is not finite; or the model
            is no decoder-only one.
    """
    anatomy = require_decoder(base)
    _check_texts(base, prefix, examples)
    order = sorted(examples, key=lambda example: -len(example.input_ids))  # little is padded
    meter = _Meter(prefix, len(order[0].input_ids), within)
    collate = Collator(base.tokenizer.pad_token_id)
    with torch.no_grad(), attach(base.model, prefix), recording(anatomy.attention, meter.take):
        for start in range(0, len(order), batch_size):
            batch = collate(order[start : start + batch_size])
            ids, mask = (batch[name].to(input_device(base.model)) for name in ("input_ids", "attention_mask"))
            _read(anatomy, ids, mask, meter, chunk_tokens)
            if on_progress is not None:
                on_progress(min(start + batch_size, len(order)), len(order))
    return meter.result()


def _read(
    anatomy: Anatomy, ids: Int[Tensor, "b t"], mask: Int[Tensor, "b t"], meter: _Meter, chunk_tokens: int
) -> None:
    width, cache = ids.shape[1], None
    for start in range(0, width, chunk_tokens):
        stop = min(start + chunk_tokens, width)
        meter.begin(mask[:, start:stop], start)
        cache = anatomy.stack(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            use_cache=width > chunk_tokens,
            **cache_argument(anatomy.stack, cache),
        ).past_key_values


def require_decoder(base: Base) -> Anatomy:
    """Return the anatomy of a decoder-only model; refuse others, whose several texts have no one length.

    Raises:
        EvaluationError: it is no decoder-only one.
    """
    anatomy = inspect_model(base.model)
    if anatomy.geometry.placements != (Placement.DECODER_SELF,):
        raise EvaluationError(
            f"{base.id}: attention mass is measured in decoder-only models; this one has "
            f"{', '.join(anatomy.geometry.placements)} attention"
        )
    return anatomy


def _check_texts(base: Base, prefix: Prefix, examples: Sequence[Example]) -> None:
    longest = max((len(example.input_ids) for example in examples), default=0)
    if not longest:
        raise EvaluationError("no text to read; give at least one with a token")
    limit = base.context_tokens
    if limit is not None and prefix.position_offset + longest > limit:
        raise EvaluationError(
            f"prefix {prefix.position_offset} + text {longest} tokens exceed the model's context of {limit}; "
            "give shorter texts"
        )


def _lengths(states: SiteStates, part: str) -> Float[Tensor, "p"]:
    numbers: Tensor = getattr(states, part)  # [g, p, d]
    lengths: Tensor = torch.linalg.vector_norm(numbers.cpu().double(), dim=2).mean(0)
    return lengths
