"""What an encoder-decoder reads and learns: one text for its encoder, one for its decoder.

The decoder's ids begin with the token the model starts from, which has no loss, so that everywhere else an example is
scored in one way: the token at place i is predicted from those before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from prefixkit.data.encoding import Ids, opening_ids


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
    """
    if not sources:
        return []
    read = source_ids(sources, tokenizer)
    written: list[list[int]] = tokenizer(text_target=list(targets), verbose=False)["input_ids"]
    closing = closing_ids(tokenizer)
    return [
        Pair(
            _cut(source, max_tokens, closing),
            (start, *target)[:max_tokens],
            is_cut=len(source) > max_tokens or 1 + len(target) > max_tokens,
        )
        for source, target in zip(read, written, strict=True)
    ]


def source_ids(sources: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Ids]:
    """Return what an encoder reads of each text."""
    return [tuple(ids) for ids in tokenizer(list(sources), verbose=False)["input_ids"]]


def closing_ids(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Return the special tokens, such as EOS, that the tokenizer puts behind every text; often one."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return tuple(whole[len(opening_ids(tokenizer)) + len(plain) :])


def _cut(ids: Ids, max_tokens: int, closing: Ids) -> Ids:
    if len(ids) <= max_tokens:
        return ids
    return ids[: max_tokens - len(closing)] + closing
