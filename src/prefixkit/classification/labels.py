"""From texts to labels with their probabilities."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prefixkit.classification.hidden import OnTexts, hidden_at
from prefixkit.config import Pooling
from prefixkit.errors import ArtefactError, DataError
from prefixkit.models import Base
from prefixkit.models.reading import Reading, read_texts, read_texts_to_last, read_words
from prefixkit.prefix import Head, HeadKind, Prefix
from prefixkit.texts import clean_text, is_unicode

#: Tokens of a text that are read where neither the artefact nor the model says.
_MOST_TOKENS = 512


@dataclass(frozen=True)
class ClassifiedText:
    """A text and what the head says of it.

    Attributes:
        label: the likeliest label.
        probabilities: of every label of this head; they sum to 1.
        is_cut: whether only the text's beginning was read.
    """

    label: str
    probabilities: dict[str, float]
    is_cut: bool


@dataclass(frozen=True)
class TaggedWord:
    """A word and what the head says of it.

    Attributes:
        word: the word.
        label: the likeliest label; None where the word was not read: it was cut off, or has no token of its own.
        probability: of that label.
    """

    word: str
    label: str | None
    probability: float | None


def classify(
    base: Base,
    texts: Sequence[str],
    prefix: Prefix | Sequence[Prefix],
    *,
    max_tokens: int | None = None,
    batch_size: int = 32,
    on_progress: OnTexts | None = None,
) -> list[ClassifiedText]:
    """Label whole texts, cleaned as the training texts were (`data.clean_html`).

    Args:
        base: the frozen model, with nothing attached.
        texts: the texts.
        prefix: one prefix with a head for all texts, or one for each: the texts of one batch may belong to different
            tasks.
        max_tokens: longer texts are cut; left out, what the prefix was trained on.
        batch_size: most texts per forward pass.
        on_progress: told about progress.

    Raises:
        ArtefactError: a prefix has no head for whole texts.
        DataError: a single text was given, there is neither one prefix nor one per text, or a text cannot be read.
        InjectionError: a prefix does not fit the model.
    """
    if isinstance(texts, str):
        raise DataError("texts: expected a list of texts, got one text; write [text]")
    _require_unicode(texts)
    heads, prefixes = _heads(prefix, len(texts), HeadKind.SEQUENCE), _each(prefix, len(texts))
    cleaned = [clean_text(text) if _was_cleaned(own) else text for text, own in zip(texts, prefixes, strict=True)]
    limits = _limits(base, prefixes, max_tokens)
    ways = [(limit, head.pooling is Pooling.LAST) for limit, head in zip(limits, heads, strict=True)]
    readings = _read(partial(_read_texts, base), cleaned, ways)
    found = _probabilities(base, readings, heads, prefix, batch_size, on_progress)
    return [
        ClassifiedText(max(row[0], key=row[0].__getitem__), row[0], reading.is_cut)
        for row, reading in zip(found, readings, strict=True)
    ]


def tag(
    base: Base,
    rows: Sequence[Sequence[str]],
    prefix: Prefix | Sequence[Prefix],
    *,
    max_tokens: int | None = None,
    batch_size: int = 32,
    on_progress: OnTexts | None = None,
) -> list[list[TaggedWord]]:
    """Label every word of texts that are given as lists of words.

    Args:
        base: as for `classify`, and so are the other arguments.
        rows: the words of each text.
        prefix: with a head for words.
        max_tokens: words behind so many tokens get no label.
        batch_size: as for `classify`.
        on_progress: likewise.

    Raises:
        ArtefactError: a prefix has no head for words.
        DataError: as for `classify`, or the tokenizer cannot say which token belongs to which word.
        InjectionError: a prefix does not fit the model.
    """
    if isinstance(rows, str) or any(isinstance(words, str) for words in rows):
        raise DataError("rows: expected a list of words for each text, got a text; split it into words")
    _require_unicode(word for words in rows for word in words)
    heads, prefixes = _heads(prefix, len(rows), HeadKind.TOKEN), _each(prefix, len(rows))
    limits = _limits(base, prefixes, max_tokens)
    readings = _read(lambda part, limit: read_words(part, base.tokenizer, max_tokens=limit), rows, limits)
    found = _probabilities(base, readings, heads, prefix, batch_size, on_progress)
    tagged = []
    for words, reading, probabilities in zip(rows, readings, found, strict=True):
        labels = iter(probabilities)
        own = [TaggedWord(word, None, None) if place is None else _likeliest(word, next(labels))
               for word, place in zip(words, reading.places, strict=True)]  # fmt: skip
        tagged.append(own)
    return tagged


def _read_texts(base: Base, texts: list[str], way: tuple[int, bool]) -> list[Reading]:
    """Read texts of at most so many tokens, as heads trained here or as transformers' own read them."""
    max_tokens, to_last = way
    if not to_last:
        return read_texts(texts, base.tokenizer, reads_both_ways=base.reads_both_ways, max_tokens=max_tokens)
    known: int | None = base.model.config.get_text_config().pad_token_id
    pad_token_id = base.tokenizer.pad_token_id if known is None else known
    return read_texts_to_last(texts, base.tokenizer, pad_token_id=pad_token_id, max_tokens=max_tokens)


def _require_unicode(texts: Iterable[str]) -> None:
    if not all(map(is_unicode, texts)):
        raise DataError("a text holds half a character (a lone surrogate); give it as UTF-8")


def _read(read: Callable[[list[Any], Any], list[Reading]], texts: Sequence[Any], ways: Sequence[Any]) -> list[Reading]:
    """Read every text in its way, those with the same way in one go."""
    found: dict[int, Reading] = {}
    for way in set(ways):
        rows = [row for row, own in enumerate(ways) if own == way]
        found |= dict(zip(rows, read([texts[row] for row in rows], way), strict=True))
    return [found[row] for row in range(len(texts))]


def _likeliest(word: str, probabilities: dict[str, float]) -> TaggedWord:
    label = max(probabilities, key=probabilities.__getitem__)
    return TaggedWord(word, label, probabilities[label])


def _probabilities(
    base: Base,
    readings: Sequence[Reading],
    heads: Sequence[Head],
    prefix: Prefix | Sequence[Prefix],
    batch_size: int,
    on_progress: OnTexts | None,
) -> list[list[dict[str, float]]]:
    """Return the probabilities at every place of each text."""
    hidden = hidden_at(
        base,
        [reading.ids for reading in readings],
        [_places(head, reading) for head, reading in zip(heads, readings, strict=True)],
        prefix=prefix,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    return [
        [dict(zip(head.labels, each.tolist(), strict=True)) for each in _softmax(head(states))]
        for head, states in zip(heads, hidden, strict=True)
    ]


def _softmax(logits: Float[Tensor, "k c"]) -> Float[Tensor, "k c"]:
    """Return probabilities that sum to 1: in bfloat16 they would not."""
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _places(head: Head, reading: Reading) -> list[int] | None:
    """Return where the head looks; None for the mean over the text."""
    return None if head.pooling is Pooling.MEAN else [place for place in reading.places if place is not None]


def _each(prefix: Prefix | Sequence[Prefix], count: int) -> list[Prefix]:
    return [prefix] * count if isinstance(prefix, Prefix) else list(prefix)


def _heads(prefix: Prefix | Sequence[Prefix], count: int, kind: HeadKind) -> list[Head]:
    """Return the head for each text."""
    prefixes = _each(prefix, count)
    if len(prefixes) != count:
        raise DataError(f"{len(prefixes)} prefixes for {count} texts; give one prefix, or one for each text")
    heads = [each.head for each in prefixes if each.head is not None and each.head.kind is kind]
    if len(heads) != count:
        wanted = "whole texts (data.format classes)" if kind is HeadKind.SEQUENCE else "words (data.format tags)"
        raise ArtefactError(f"the artefact of {prefixes[0].card.base.id} has no head for {wanted}; train one with it")
    return heads


def _limits(base: Base, prefixes: Sequence[Prefix], max_tokens: int | None) -> list[int]:
    return [_trained_tokens(base, each) if max_tokens is None else max_tokens for each in prefixes]


def _was_cleaned(prefix: Prefix) -> bool:
    """Whether the prefix learned from texts without web mark-up."""
    return prefix.card.training is not None and bool(prefix.card.training.recipe["data"]["clean_html"])


def _trained_tokens(base: Base, prefix: Prefix) -> int:
    """Return the longest text the prefix was trained on, or the longest the model takes."""
    if prefix.card.training is not None:
        return int(prefix.card.training.recipe["data"]["max_tokens"])
    limit = base.context_tokens
    return _MOST_TOKENS if limit is None else min(_MOST_TOKENS, limit - prefix.position_offset)
