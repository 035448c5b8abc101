"""What a tokenizer puts around a text stays around it, cut or not; what a decoder writes ends."""

from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from prefixkit.errors import DataError
from prefixkit.models.specials import opening_ids, source_ids, target_ids, target_words

BOS, EOS = 1, 2


@pytest.fixture
def plain(tiny_llama_dir: Any) -> PreTrainedTokenizerFast:
    """Puts nothing around a text."""
    return PreTrainedTokenizerFast.from_pretrained(tiny_llama_dir)


@pytest.fixture
def closed(plain: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Puts BOS before a text and EOS behind it, as BART's does."""
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return plain


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_what_stands_before_a_text_is_found(plain: PreTrainedTokenizerFast) -> None:
    assert opening_ids(plain) == ()


def test_what_stands_around_a_text_is_kept_when_it_is_cut(closed: PreTrainedTokenizerFast) -> None:
    a, b, c = ids(closed, "the film was")
    assert opening_ids(closed) == (BOS,)
    assert source_ids(["the film was"], closed) == [(BOS, a, b, c, EOS)]
    assert source_ids(["the film was", "the"], closed, max_tokens=4) == [(BOS, a, b, EOS), (BOS, a, EOS)]
    assert source_ids([""], closed) == [(BOS, EOS)]
    assert source_ids([], closed) == []


def test_a_target_ends_whether_or_not_the_tokenizer_says_so(plain: Any, closed: PreTrainedTokenizerFast) -> None:
    bare = ids(closed, "great fun")
    assert target_ids(["great fun"], closed) == [(BOS, *bare, EOS)]
    assert target_words(["great fun"], closed) == ((BOS,), [bare])


def test_a_target_ends_where_the_tokenizer_puts_nothing_around_it(plain: PreTrainedTokenizerFast) -> None:
    assert target_ids(["great fun"], plain) == [(*ids(plain, "great fun"), EOS)]
    assert target_words(["great fun"], plain) == ((), [ids(plain, "great fun")])


def test_an_empty_input_is_refused_where_nothing_stands_around_it(plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="an input is empty, and a model needs at least one token to read"):
        source_ids(["the film", ""], plain)
