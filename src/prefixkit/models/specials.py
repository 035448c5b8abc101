"""The special tokens a tokenizer puts around a text, and what an encoder-decoder's stacks read of one with them."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefixkit.errors import DataError

Ids = tuple[int, ...]

#: Texts tokenised at a time: beside the ids, a tokenizer keeps far larger notes on every text of one call.
AT_ONCE = 1000


def token_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, special_tokens: bool) -> list[Ids]:
    """Return the token ids of each text.

    Args:
        texts: any number; those that are longer than the model's context too.
        tokenizer: the base model's.
        special_tokens: whether the tokenizer puts its own around each text.
    """
    options: dict[str, Any] = {"add_special_tokens": special_tokens, "return_attention_mask": False, "verbose": False}
    found: list[Ids] = []
    for start in range(0, len(texts), AT_ONCE):
        found += map(tuple, tokenizer(list(texts[start : start + AT_ONCE]), **options)["input_ids"])
    return found


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Return the special tokens, such as BOS, that the tokenizer puts before every text; often none."""
    return around_text(tokenizer)[0]


def around_text(tokenizer: PreTrainedTokenizerBase) -> tuple[Ids, Ids]:
    """Return the special tokens that the tokenizer puts before and behind every text; often none."""
    return _around(tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"])


def source_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None = None) -> list[Ids]:
    """Return what an encoder reads of each text, with the tokenizer's special tokens around it.

    Args:
        texts: what is read.
        tokenizer: the base model's.
        max_tokens: longer texts are cut to so many tokens and keep the special tokens at their end.

    Raises:
        DataError: a text is empty, and the tokenizer puts nothing around it; or `max_tokens` leaves no room for text.
    """
    whole = token_ids(texts, tokenizer, special_tokens=True)
    if not all(whole):
        raise DataError("an input is empty, and a model needs at least one token to read; leave out such rows")
    if max_tokens is None or max(map(len, whole), default=0) <= max_tokens:
        return whole
    opening, closing = around_text(tokenizer)
    require_room(max_tokens, opening + closing)
    return [cut(ids, max_tokens, closing) for ids in whole]


def cut(ids: Ids, max_tokens: int, closing: Ids) -> Ids:
    """Return a text's ids, cut to so many tokens if there are more; what closes a text stays at its end."""
    return ids if len(ids) <= max_tokens else ids[: max_tokens - len(closing)] + closing


def require_room(max_tokens: int, special: Ids) -> None:
    """Raise if so many tokens hold the special ones around a text and nothing of the text.

    Raises:
        DataError: they do.
    """
    if max_tokens <= len(special):
        raise DataError(
            f"data.max_tokens: {max_tokens} leaves no room for text beside {len(special)} special tokens; raise it"
        )


def target_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Ids]:
    """Return what a decoder is to write for each text: with the tokenizer's special tokens for targets, and an EOS."""
    if not texts:
        return []
    end = tokenizer.eos_token_id
    written = [tuple(ids) for ids in _targets(tokenizer, texts)]
    return [ids if end is None or end in ids else (*ids, end) for ids in written]


def target_words(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[Ids, list[Ids]]:
    """Return the special tokens a decoder writes before every text (BART's BOS), and each text's own tokens."""
    bare = [tuple(ids) for ids in _targets(tokenizer, texts, add_special_tokens=False)]
    plain, whole = _targets(tokenizer, ["a"], add_special_tokens=False)[0], _targets(tokenizer, ["a"])[0]
    return _around(plain, whole)[0], bare


def _targets(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options: Any) -> list[list[int]]:
    found: list[list[int]] = []
    for start in range(0, len(texts), AT_ONCE):
        part = list(texts[start : start + AT_ONCE])
        found += tokenizer(text_target=part, verbose=False, **options)["input_ids"]
    return found


def _around(plain: list[int], whole: list[int]) -> tuple[Ids, Ids]:
    """Return what stands before and behind the plain ids in the whole ones; nothing where they are not in them."""
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    return (), ()
