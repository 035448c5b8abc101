"""What an encoder-decoder reads and learns: one text for its encoder, one for its decoder.

The decoder's ids begin with the token the model starts from, which has no loss, so that everywhere else an example is
scored in one way: the token at place i is predicted from those before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from prefixkit.models.specials import Ids, source_ids, target_ids


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of one row.

    Attributes:
        source: what the encoder reads, with the tokenizer's special tokens.
        target: what the decoder reads and learns, from its start token to the end of text.
        is_cut: whether either was longer than allowed.
    """

    source: Ids
    target: Ids
    is_cut: bool


def encode_pairs(
    sources: Sequence[str], targets: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, start: int, max_tokens: int
) -> list[Pair]:
    """Return the ids of every pair, each text cut to `max_tokens`.

    A source that is cut keeps the special tokens at its end; a target that is cut loses them, for it does not end.

    Args:
        sources: what the encoder reads.
        targets: what the decoder writes.
        tokenizer: the base model's; targets are tokenised as its `text_target`.
        start: the token the decoder starts from.
        max_tokens: most tokens of either text.

    Raises:
        DataError: a source is empty, and the tokenizer puts nothing around it.
    """
    whole, kept = source_ids(sources, tokenizer), source_ids(sources, tokenizer, max_tokens=max_tokens)
    written = [(start, *ids) for ids in target_ids(targets, tokenizer)]
    return [
        Pair(source, target[:max_tokens], is_cut=len(before) > max_tokens or len(target) > max_tokens)
        for before, source, target in zip(whole, kept, written, strict=True)
    ]
