"""What a model reads of texts that are to be labelled, and the hidden states a classification head looks at.

A whole text is labelled from one hidden state: in an encoder, which reads both ways, that of the first token, which its
tokenizer puts there for the purpose (BERT's [CLS]); in a decoder-only model, where only the last token has seen all
the others, that of an end-of-text token behind the text (Radford et al., 2018, §3.3: an extract token); or, in either,
from the mean over the text. A word is labelled from the hidden state of its first token.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixkit.errors import DataError, UnsupportedModelError
from prefixkit.models.inspect import Kind, inspect_model
from prefixkit.models.specials import AT_ONCE, Ids, around_text, cut, require_room, source_ids, token_ids

#: How tokenizers write a space at the beginning of a token.
_SPACES = "▁Ġ "


@dataclass(frozen=True, slots=True)
class Reading:
    """One text, as the model reads it.

    Attributes:
        ids: the tokens, special ones included.
        places: where the hidden states stand that are labelled: one for a whole text; or one per word, None for a
            word without a token of its own, or one that was cut off.
        is_cut: whether the text was longer than allowed.
    """

    ids: Ids
    places: tuple[int | None, ...]
    is_cut: bool


def read_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, reads_both_ways: bool, max_tokens: int
) -> list[Reading]:
    """Return what is read of texts that get one label each.

    Args:
        texts: the texts.
        tokenizer: the base model's.
        reads_both_ways: whether the model is an encoder.
        max_tokens: longer texts are cut; special tokens at their end stay.

    Raises:
        DataError: a text is empty, and the tokenizer puts nothing around it; or `max_tokens` leaves no room for text.
    """
    opening, closing = around_text(tokenizer)
    if reads_both_ways:
        whole = source_ids(texts, tokenizer)
        require_room(max_tokens, opening + closing)
        return [Reading(cut(ids, max_tokens, closing), (0,), is_cut=len(ids) > max_tokens) for ids in whole]
    if not closing and tokenizer.eos_token_id is not None:
        closing = (tokenizer.eos_token_id,)
    require_room(max_tokens, opening + closing)
    whole = [opening + ids + closing for ids in token_ids(texts, tokenizer, special_tokens=False)]
    if not all(whole):
        raise DataError("a text is empty, and a model needs at least one token to read; leave out such rows")
    return [
        Reading(cut(ids, max_tokens, closing), (min(len(ids), max_tokens) - 1,), is_cut=len(ids) > max_tokens)
        for ids in whole
    ]


def read_texts_to_last(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, pad_token_id: int | None, max_tokens: int
) -> list[Reading]:
    """Return what transformers' own classes read of texts that get one label each (`Pooling.LAST`).

    They put nothing behind a text, and look at its last token that is not the padding token, wherever padding stands.

    Args:
        texts: the texts.
        tokenizer: the base model's.
        pad_token_id: the padding token; None if none is known.
        max_tokens: longer texts are cut; special tokens at their end stay.

    Raises:
        DataError: as for `read_texts`; or a text ends in an end-of-text token and no padding token is known: the class
            the head comes from may have had that one.
    """
    opening, closing = around_text(tokenizer)
    require_room(max_tokens, opening + closing)
    readings = []
    for whole in source_ids(texts, tokenizer):
        ids = cut(whole, max_tokens, closing)
        if pad_token_id is None and ids[-1] == tokenizer.eos_token_id:
            raise DataError(
                "a text ends in the end-of-text token, and the base model names no padding token: whether its head "
                "looks there cannot be known; set model.config.pad_token_id to what it was trained with"
            )
        last = max((place for place, token in enumerate(ids) if token != pad_token_id), default=0)
        readings.append(Reading(ids, (last,), is_cut=len(whole) > max_tokens))
    return readings


def read_words(rows: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> list[Reading]:
    """Return what is read of lists of words that get a label each: the words with a space between them.

    Args:
        rows: the words of each text.
        tokenizer: the base model's.
        max_tokens: words that would come after so many tokens are cut off.

    Raises:
        DataError: the tokenizer cannot say which token belongs to which word, a text has no tokens, or `max_tokens`
            leaves no room for any.
    """
    if not tokenizer.is_fast:
        raise DataError(
            "data.format: tags needs a tokenizer that tells where its tokens stand in the text; this base model has a "
            "slow one, choose a model with a tokenizer.json"
        )
    opening, closing = around_text(tokenizer)
    room = max_tokens - len(opening) - len(closing)
    require_room(max_tokens, opening + closing)
    readings = []
    for words, ids, spans in _with_spans(rows, tokenizer):
        read = (*opening, *ids[:room], *closing)
        if not read:
            raise DataError("a text has no tokens, and a model needs at least one to read; leave out such rows")
        bare = [not token.strip(_SPACES) for token in tokenizer.convert_ids_to_tokens(ids)]
        places = _first_tokens(words, spans, bare)
        at = tuple(None if place is None or place >= room else place + len(opening) for place in places)
        readings.append(Reading(read, at, is_cut=len(ids) > room))
    return readings


def _with_spans(
    rows: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Sequence[str], list[int], list[tuple[int, int]]]]:
    """Yield the words of each text, its tokens, and from where to where each of those stands."""
    options: dict[str, Any] = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        found = tokenizer([" ".join(words) for words in part], **options)
        yield from zip(part, found["input_ids"], found["offset_mapping"], strict=True)


def _first_tokens(words: Sequence[str], spans: Sequence[tuple[int, int]], is_bare: Sequence[bool]) -> list[int | None]:
    """Return the first token of each word, by where both stand in the text; None where it has none of its own.

    A token that is a space and nothing else is no word's, wherever the tokenizer says that it stands.
    """
    places: list[int | None] = []
    start, token = 0, 0
    for word in words:
        end = start + len(word)
        while token < len(spans) and (spans[token][1] <= start or is_bare[token]):  # ends before the word begins
            token += 1
        is_own = token < len(spans) and spans[token][0] < end and token not in places
        places.append(token if is_own else None)
        start = end + 1
    return places


def last_hidden_state(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Float[Tensor, "b t e"]:
    """Return the states of a model's last layer, behind its final norm: what a head reads.

    Args:
        model: an encoder or a decoder-only model, with or without a prefix attached.
        batch: input_ids and attention_mask, `[b, t]`.

    Raises:
        UnsupportedModelError: the model has an encoder and a decoder.
    """
    anatomy = inspect_model(model)
    if anatomy.kind is Kind.ENCODER_DECODER:
        raise UnsupportedModelError(
            f"{type(model).__name__}: an encoder-decoder has no hidden state of the whole text; take an encoder, such "
            "as bert-base-uncased, or a decoder-only model"
        )
    options = {"use_cache": False} if anatomy.kind is Kind.DECODER else {}
    hidden: Tensor = anatomy.stack(**batch, **options)[0]
    return hidden


def mean_state(hidden: Float[Tensor, "b t e"], mask: Int[Tensor, "b t"], dtype: torch.dtype) -> Float[Tensor, "b e"]:
    """Return the mean hidden state of each text, padding left out.

    Args:
        hidden: states of the last layer.
        mask: 1 for text, 0 for padding.
        dtype: number format to add up in.
    """
    weights = mask.to(dtype)[..., None]  # [b, t, 1]
    return (hidden.to(dtype) * weights).sum(1) / weights.sum(1)
