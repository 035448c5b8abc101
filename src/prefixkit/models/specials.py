"""The special tokens a tokenizer puts around a text, and what an encoder-decoder's stacks read of one with them."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefixkit.errors import DataError

Ids = tuple[int, ...]


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Return the special tokens, such as BOS, that the tokenizer puts before every text; often none."""
    return _around(tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"])[0]


def source_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None = None) -> list[Ids]:
    """Return what an encoder reads of each text, with the tokenizer's special tokens around it.

    Args:
        texts: what is read.
        tokenizer: the base model's.
        max_tokens: longer texts are cut to so many tokens and keep the special tokens at their end.

    Raises:
        DataError: a text is empty, and the tokenizer puts nothing around it.
    """
    if not texts:
        return []
    whole = [tuple(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]]
    if not all(whole):
        raise DataError("an input is empty, and an encoder needs at least one token to read; leave out such rows")
    if max_tokens is None or max(map(len, whole)) <= max_tokens:
        return whole
    closing = _around(tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"])[1]
    kept = max_tokens - len(closing)
    return [ids if len(ids) <= max_tokens else ids[:kept] + closing for ids in whole]


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
    ids: list[list[int]] = tokenizer(text_target=list(texts), verbose=False, **options)["input_ids"]
    return ids


def _around(plain: list[int], whole: list[int]) -> tuple[Ids, Ids]:
    """Return what stands before and behind the plain ids in the whole ones; nothing where they are not in them."""
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    return (), ()
