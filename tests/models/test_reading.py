"""What is read of a text to be labelled, and where: at the right token, cut or not."""

import string

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModel, AutoModelForTokenClassification, ByT5Tokenizer, PreTrainedTokenizerFast

from conformance.encoder_families import ENCODER_DECODERS, ENCODERS, build
from prefixkit.errors import DataError, UnsupportedModelError
from prefixkit.injection import attach
from prefixkit.models.reading import last_hidden_state, read_texts, read_words

SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
PAD, BOS, EOS, OTHER = range(4)
CORPUS = ["Review: I loved this film, it was wonderful and the acting was good."] * 3


def around(template):
    return processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", BOS), ("<eos>", EOS), ("<unk>", OTHER)]
    )


def fast(tokenizer, **changes):
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names | changes)


def bpe(pre, decoder, after=None, **changes):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoder
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if after is not None:
        tokenizer.post_processor = after
    return fast(tokenizer, **changes)


def byte_level(after=None, **changes):
    return bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), after, **changes)


def roberta():
    """A space before the first word too, and offsets without it."""
    after = processors.RobertaProcessing(("<eos>", EOS), ("<bos>", BOS), trim_offsets=True, add_prefix_space=True)
    return bpe(pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel(), after)


def metaspace():
    """A space before the first word, as SentencePiece models have it, in the offsets too."""
    return bpe(pre_tokenizers.Metaspace(), decoders.Metaspace(), around("<bos> $A"))


def wordpiece():
    words = [
        *SPECIALS,
        "film",
        "loved",
        "love",
        "##d",
        *string.ascii_letters,
        *(f"##{c}" for c in "é" + string.ascii_letters),
    ]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)  # drops control characters
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer.post_processor = around("<bos> $A <eos>")
    return fast(tokenizer)


def plain_ids(tokenizer, text):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def read_text(text, tokenizer, **settings):
    (reading,) = read_texts([text], tokenizer, **settings)
    return reading


def read_row(words, tokenizer, max_tokens=99):
    (reading,) = read_words([words], tokenizer, max_tokens=max_tokens)
    return reading


@pytest.mark.parametrize("make", [wordpiece, roberta])
def test_an_encoder_reads_what_stands_around_a_text_cut_or_not(make):
    tokenizer = make()
    bare = plain_ids(tokenizer, "loved film")
    whole = len(bare) + 2
    assert len(bare) > 1
    for most in (whole, whole - 1, 3):
        reading = read_text("loved film", tokenizer, reads_both_ways=True, max_tokens=most)
        assert reading.ids == (BOS, *bare[: most - 2], EOS)
        assert reading.places == (0,)
        assert reading.is_cut == (most < whole)


def test_each_text_is_cut_on_its_own():
    tokenizer = wordpiece()
    for both_ways in (True, False):
        cut, short = read_texts(["film film film", "film"], tokenizer, reads_both_ways=both_ways, max_tokens=4)
        assert (len(cut.ids), cut.is_cut) == (4, True)
        assert (len(short.ids), short.is_cut) == (3, False)


@pytest.mark.parametrize(
    ("after", "opening", "end"),
    [(None, (), EOS), ("<bos> $A", (BOS,), EOS), ("<bos> $A <eos>", (BOS,), EOS), ("$A <unk>", (), OTHER)],
)
def test_a_decoder_reads_one_end_of_text_behind_the_text_cut_or_not(after, opening, end):
    tokenizer = byte_level(after and around(after))
    bare = plain_ids(tokenizer, "I loved this film")
    whole = len(opening) + len(bare) + 1
    for most in (whole, whole - 1, len(opening) + 2):
        reading = read_text("I loved this film", tokenizer, reads_both_ways=False, max_tokens=most)
        assert reading.ids == (*opening, *bare[: most - len(opening) - 1], end)
        assert reading.places == (most - 1,)
        assert reading.is_cut == (most < whole)


def test_a_decoder_that_knows_no_end_of_text_is_read_at_the_last_token():
    tokenizer = byte_level(eos_token=None)
    bare = plain_ids(tokenizer, "I loved this film")
    assert read_text("I loved this film", tokenizer, reads_both_ways=False, max_tokens=99).ids == bare
    reading = read_text("I loved this film", tokenizer, reads_both_ways=False, max_tokens=len(bare) - 1)
    assert (reading.ids, reading.places, reading.is_cut) == (bare[:-1], (len(bare) - 2,), True)


def test_an_empty_text_is_read_where_something_stands_around_it_and_refused_elsewhere():
    assert read_text("", byte_level(), reads_both_ways=False, max_tokens=9).ids == (EOS,)
    assert read_text("", wordpiece(), reads_both_ways=True, max_tokens=9).ids == (BOS, EOS)
    with pytest.raises(DataError) as caught:
        read_text("", byte_level(eos_token=None), reads_both_ways=False, max_tokens=9)
    assert str(caught.value) == "a text is empty, and a model needs at least one token to read; leave out such rows"
    with pytest.raises(DataError, match="^an input is empty, and a model needs at least one token to read"):
        read_text("", byte_level(), reads_both_ways=True, max_tokens=9)


@pytest.mark.parametrize("make", [byte_level, roberta, metaspace, wordpiece])
def test_a_word_is_labelled_at_its_first_token(make):
    """The tokens from one place to the next spell the word."""
    tokenizer = make()
    words = ["loved", "Zébra", "film", "loved", "and", "x"]
    reading = read_row(words, tokenizer)
    assert len(set(reading.places)) == len(words)
    assert not reading.is_cut
    ends = [*reading.places[1:], len(reading.ids)]
    spelt = [tokenizer.decode(list(reading.ids[place:end]), skip_special_tokens=True).strip()
             for place, end in zip(reading.places, ends, strict=True)]  # fmt: skip
    assert spelt == words
    assert reading.ids == tuple(tokenizer(" ".join(words))["input_ids"])


def test_a_space_of_its_own_belongs_to_no_word():
    tokenizer = byte_level()
    reading = read_row(["loved", "éx"], tokenizer)
    place = reading.places[1]
    assert tokenizer.convert_ids_to_tokens([*reading.ids[place - 1 : place + 1]]) == ["Ġ", "Ã"]


@pytest.mark.parametrize(
    ("words", "read"),
    [
        (["\u200d", "film", "loved"], [None, "film", "loved"]),
        (["film", "\u200d", "loved"], ["film", None, "loved"]),
        (["film", "loved", "\u200d"], ["film", "loved", None]),
        (["\u200dfilm", "loved\u200d"], ["film", "loved"]),
    ],
)
def test_a_word_whose_letters_the_tokenizer_drops_gets_no_label(words, read):
    tokenizer = wordpiece()
    reading = read_row(words, tokenizer)
    found = [place and tokenizer.convert_ids_to_tokens(reading.ids[place]) for place in reading.places]
    assert found == read


def test_of_words_that_share_a_token_the_first_has_it():
    whole_texts = Tokenizer(models.WordLevel({"<unk>": 0, "a b c": 1}, unk_token="<unk>"))
    shared = PreTrainedTokenizerFast(tokenizer_object=whole_texts, unk_token="<unk>")
    assert read_row(["a", "b", "c"], shared).places == (0, None, None)


@pytest.mark.parametrize("make", [wordpiece, roberta, metaspace, byte_level])
def test_words_that_are_cut_off_get_no_label(make):
    tokenizer = make()
    words = ["loved", "Zébra", "film"]
    whole = read_row(words, tokenizer)
    before = whole.places[0]
    behind = len(whole.ids) - before - len(plain_ids(tokenizer, " ".join(words)))
    for most in range(before + behind + 1, len(whole.ids) + 1):
        reading = read_row(words, tokenizer, most)
        assert len(reading.ids) == most
        assert reading.places == tuple(place if place < most - behind else None for place in whole.places)
        assert reading.is_cut == (most < len(whole.ids))
        assert reading.ids == whole.ids[: most - behind] + whole.ids[len(whole.ids) - behind :]
        # A place is still that of the word's first token.
        assert all(place is None or reading.ids[place] == whole.ids[place] for place in reading.places)


def test_a_tokenizer_that_cannot_say_where_its_tokens_stand_is_refused():
    with pytest.raises(DataError) as caught:
        read_words([["film"]], ByT5Tokenizer(), max_tokens=9)
    assert str(caught.value) == (
        "data.format: tags needs a tokenizer that tells where its tokens stand in the text; this base model has a slow "
        "one, choose a model with a tokenizer.json"
    )


def batch(make_ids):
    """Two rows of different length."""
    ids = make_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("head", [AutoModel, AutoModelForTokenClassification])
def test_the_last_hidden_state_is_what_an_encoders_own_head_reads(encoder, head, make_ids):
    model, inputs = build(ENCODERS[encoder], head), batch(make_ids)
    hidden = last_hidden_state(model, inputs)
    assert torch.equal(hidden, model(**inputs, output_hidden_states=True).hidden_states[-1])
    if head is AutoModel:
        assert torch.equal(hidden, model(**inputs).last_hidden_state)


def test_the_last_hidden_state_is_what_a_decoders_own_head_reads(family, make_model, make_ids):
    model, inputs = make_model(family), batch(make_ids)
    expected = model(**inputs, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(last_hidden_state(model, inputs), expected)


def test_the_last_hidden_state_sees_the_prefix(make_prefix, make_ids):
    model, inputs = build(ENCODERS["bert"], AutoModel), batch(make_ids)
    plain = last_hidden_state(model, inputs)
    with attach(model, make_prefix(model)):
        seen = last_hidden_state(model, inputs)
        assert torch.equal(seen, model(**inputs).last_hidden_state)
    assert (seen - plain).abs().amax(dim=(1, 2)).min() > 1e-4


def test_a_model_with_an_encoder_and_a_decoder_is_refused(make_ids):
    model = build(ENCODER_DECODERS["t5"])
    with pytest.raises(UnsupportedModelError) as caught:
        last_hidden_state(model, batch(make_ids))
    assert str(caught.value) == (
        "T5ForConditionalGeneration: an encoder-decoder has no hidden state of the whole text; take an encoder, such "
        "as bert-base-uncased, or a decoder-only model"
    )


def test_a_space_of_its_own_before_the_first_word_is_not_taken_for_it():
    tokenizer = metaspace()
    reading = read_row(["zebra", "loved"], tokenizer)
    tokens = tokenizer.convert_ids_to_tokens([*reading.ids])
    assert tokens[:2] == ["<bos>", "▁"]  # which the tokenizer says stands where the word does
    assert reading.places[0] == 2


@pytest.mark.parametrize("reads_both_ways", [True, False])
def test_no_room_for_text_is_an_error(reads_both_ways):
    tokenizer = wordpiece()
    message = r"^data.max_tokens: 2 leaves no room for text beside 2 special tokens; raise it$"
    with pytest.raises(DataError, match=message):
        read_texts(["film"], tokenizer, reads_both_ways=reads_both_ways, max_tokens=2)
    with pytest.raises(DataError, match=message):
        read_words([["film"]], tokenizer, max_tokens=2)


def test_words_of_which_no_token_remains_are_an_error():
    bare = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    bare.normalizer = normalizers.Replace("a", "")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare)
    with pytest.raises(DataError, match=r"^a text has no tokens, and a model needs at least one to read"):
        read_words([["a"]], tokenizer, max_tokens=9)
