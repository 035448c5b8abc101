"""From pieces of text to token ids whose boundaries are exact.

A model generates after the ids of its prompt, so an example must begin with precisely those ids. Tokenising
prompt and text in one go does not promise that: a token may straddle the boundary. Here every piece's ids
begin where the ids of what stands before it end.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

from transformers import PreTrainedTokenizerBase

from prefixkit.models.specials import Ids, token_ids

_ANCHOR = "\n"
"""What a piece is tokenised behind, so that a tokenizer does not take it for the beginning of a text."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text, with or without loss."""

    text: str
    is_learned: bool


def encode_pieces(rows: Sequence[Sequence[Piece]], tokenizer: PreTrainedTokenizerBase) -> list[list[Ids]]:
    """Return the token ids of every piece of every row, without special tokens around them.

    The first piece is tokenised alone, as generation will see it. A later piece gets the ids that the text up
    to its end has beyond those before it; where those before are no prefix, it is tokenised by itself.
    """
    texts = [list(accumulate(piece.text for piece in row)) for row in rows]
    known = _encode_distinct(chain.from_iterable(texts), tokenizer)
    encoded = []
    for row, ends in zip(rows, texts, strict=True):
        done: Ids = ()
        parts: list[Ids] = []
        for piece, end in zip(row, ends, strict=True):
            whole = known[end]
            is_continued = whole[: len(done)] == done
            parts.append(whole[len(done) :] if is_continued else _encode_inside(piece.text, tokenizer))
            done += parts[-1]
        encoded.append(parts)
    return encoded


def _encode_distinct(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Ids]:
    """Tokenise every text once."""
    distinct = list(dict.fromkeys(texts))
    return dict(zip(distinct, token_ids(distinct, tokenizer, special_tokens=False), strict=True))


def _encode_inside(text: str, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Tokenise a text as it would be in the middle of another one.

    Some tokenizers put a space before the first word of a text; behind an anchor they do not.
    """
    known = _encode_distinct([_ANCHOR, _ANCHOR + text, text], tokenizer)
    anchor, anchored = known[_ANCHOR], known[_ANCHOR + text]
    return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else known[text]
