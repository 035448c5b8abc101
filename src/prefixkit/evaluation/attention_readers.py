"""How texts are read while attention mass is measured: from left to right once, or both ways at several lengths.

A decoder's token sees what stands before it, so that one reading shows the prefix beside 1, 2, 3... tokens. In an
encoder, and in a decoder's attention to one, every query sees the whole text: to see the prefix beside a shorter one,
the text is cut and read again.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prefixkit.compat import cache_argument
from prefixkit.config import Placement
from prefixkit.data import Example
from prefixkit.evaluation.attention_meter import Meter, PlacementMass
from prefixkit.injection.recording import Reading, recording
from prefixkit.models import Base
from prefixkit.models.inspect import inspect_model
from prefixkit.models.specials import Ids, around_text, cut
from prefixkit.models.weights import input_device
from prefixkit.prefix import Prefix


class DecoderReader:
    """Reads in a decoder-only model: a query falls into the column of its position.

    Args:
        base: the frozen model, with the prefix attached when texts are read.
        prefix: what it reads.
        examples: all texts to come.
        within: tokens of a text that count, except by length.
        chunk_tokens: a longer text is read in pieces, so that memory does not grow with its square.
    """

    def __init__(
        self, base: Base, prefix: Prefix, examples: Sequence[Example], *, within: int, chunk_tokens: int
    ) -> None:
        self.base, self.anatomy, self.chunk_tokens = base, inspect_model(base.model), chunk_tokens
        self.meter = causal_meter(prefix, examples, within)

    def read(self, examples: Sequence[Example]) -> None:
        """Read one batch."""
        ids, mask = _padded(self.base, [example.input_ids for example in examples])
        width, cache = ids.shape[1], None
        with recording(self.anatomy.attention, self.meter.take):
            for start in range(0, width, self.chunk_tokens):
                stop = min(start + self.chunk_tokens, width)
                self.meter.begin(mask[:, start:stop], mask[:, start:stop], slice(start, stop))
                cache = self.anatomy.stack(
                    input_ids=ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    use_cache=width > self.chunk_tokens,
                    **cache_argument(self.anatomy.stack, cache),
                ).past_key_values

    def results(self) -> tuple[PlacementMass, ...]:
        """Return what was measured, one entry per placement."""
        return (causal_result(self.meter),)


class SourceReader:
    """Reads in an encoder, and writes as the recipe taught where a decoder goes with it.

    Column 0 is the text cut as in training. Each further column is a length of `curve_lengths`; only texts that are
    long enough are read there, and of what the decoder writes only what training had.

    Args:
        base: the frozen model, with the prefix attached when texts are read.
        prefix: what it reads.
        examples: all texts to come.
        within: length a text is cut to, except by length.
    """

    def __init__(self, base: Base, prefix: Prefix, examples: Sequence[Example], *, within: int) -> None:
        self.base, self.anatomy, self.within = base, inspect_model(base.model), within
        opening, self.closing = around_text(base.tokenizer)
        tokens = [len(_source(example)) for example in examples]
        self.lengths = curve_lengths(tokens, within=within, special=len(opening + self.closing))
        self.texts = torch.tensor([sum(n >= length for n in tokens) for length in self.lengths])  # [s]
        self.longest = max(tokens)
        self.meters = {
            placement: causal_meter(prefix, examples, within)
            if placement is Placement.DECODER_SELF
            else Meter(prefix, placement, 1 + len(self.lengths), means=slice(1), curve=slice(1, None))
            for placement in _active(prefix)
        }

    def read(self, examples: Sequence[Example]) -> None:
        """Read one batch, once as in training and once at every length."""
        self._read(examples, self.within, 0, list(self.meters))
        both_ways = [placement for placement in self.meters if placement is not Placement.DECODER_SELF]
        for column, length in enumerate(self.lengths, start=1):
            long = [example for example in examples if len(_source(example)) >= length]
            if long and both_ways:
                self._read(long, length, column, both_ways)

    def _read(self, examples: Sequence[Example], length: int, column: int, placements: Sequence[Placement]) -> None:
        """Read texts cut to a length; measure these placements."""
        ids, mask = _padded(self.base, [cut(_source(example), length, self.closing) for example in examples])
        sites = self.anatomy.geometry.sites
        watched = [m for site, m in zip(sites, self.anatomy.attention, strict=True) if site.placement in placements]
        with recording(watched, self._take):
            if Placement.ENCODER_SELF in placements:
                self.meters[Placement.ENCODER_SELF].begin(mask, mask, column)
            hidden = self.anatomy.stacks[0](input_ids=ids, attention_mask=mask)[0]  # [b, s, e]
            if not {Placement.DECODER_SELF, Placement.CROSS} & set(placements):
                return
            written = [example.input_ids if column == 0 else example.input_ids[: self.within] for example in examples]
            target, is_text = _padded(self.base, written)
            if Placement.DECODER_SELF in placements:
                self.meters[Placement.DECODER_SELF].begin(is_text, is_text, slice(0, target.shape[1]))
            if Placement.CROSS in placements:
                counted = is_text * (torch.arange(target.shape[1], device=is_text.device) < self.within)
                self.meters[Placement.CROSS].begin(counted, mask, column)
            self.anatomy.stack(
                input_ids=target, encoder_hidden_states=hidden, encoder_attention_mask=mask, use_cache=False
            )

    def _take(self, reading: Reading) -> None:
        self.meters[self.anatomy.geometry.sites[reading.site].placement].take(reading)

    def results(self) -> tuple[PlacementMass, ...]:
        """Return what was measured, one entry per placement that has virtual tokens."""
        return tuple(
            causal_result(meter)
            if placement is Placement.DECODER_SELF
            else meter.result(self.lengths, self.texts, min(self.within, self.longest))
            for placement, meter in self.meters.items()
        )


def causal_meter(prefix: Prefix, examples: Sequence[Example], within: int) -> Meter:
    """Return a meter of decoder self-attention, with a column for each position."""
    positions = max(len(example.input_ids) for example in examples)
    return Meter(prefix, Placement.DECODER_SELF, positions, means=slice(within), curve=slice(None))


def causal_result(meter: Meter) -> PlacementMass:
    """Return what such a meter shows: a text reaches a length if it has a query there."""
    positions = len(meter.queries)
    return meter.result(range(1, positions + 1), meter.queries, min(meter.means.stop, positions))


def curve_lengths(tokens: Sequence[int], *, within: int, special: int) -> tuple[int, ...]:
    """Return the lengths that texts are cut to: the shortest with text in it, powers of two, `within`, and the longest.

    Args:
        tokens: length of every text.
        within: length trained on.
        special: tokens around every text, which a cut leaves in place.

    Returns:
        In rising order; the longest is the greatest length that at least half of the texts reach.
    """
    most = sorted(tokens, reverse=True)[(len(tokens) - 1) // 2]
    wanted = {special + 1, within, *(2**power for power in range(most.bit_length()))}
    return tuple(sorted({length for length in wanted if special < length < most} | {most}))


def _active(prefix: Prefix) -> list[Placement]:
    """Return the placements that have virtual tokens, in the order of the geometry."""
    states = prefix.states
    used = [site.placement for site, p in zip(states.geometry.sites, states.lengths, strict=True) if p]
    return list(dict.fromkeys(used))


def _source(example: Example) -> Ids:
    """Return what an encoder reads."""
    return example.input_ids if example.source_ids is None else example.source_ids


def _padded(base: Base, texts: Sequence[Ids]) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Return token ids, padded on the right, and a mask that is 1 for text."""
    pad = base.tokenizer.pad_token_id
    rows = [torch.tensor(ids) for ids in texts]
    ids = pad_sequence(rows, batch_first=True, padding_value=0 if pad is None else pad)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids.to(input_device(base.model)), mask.to(input_device(base.model))
