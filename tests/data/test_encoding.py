"""The ids of a prompt are exactly those generation sees, and the text after it reads as written."""

from transformers import PreTrainedTokenizerFast

from prefixkit.data.encoding import Piece, encode_pieces


def pieces(*texts: str) -> list[Piece]:
    return [Piece(text, is_learned=True) for text in texts]


def test_first_piece_is_encoded_as_generation_encodes_it(any_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        pieces("Review:", " I loved this film"),
        pieces("Review: ", "I loved this film"),
        pieces("", "I loved this film"),
        pieces("The mov", "ie was good"),
        pieces("Review:\n", "\nI loved this", " film"),
    ]
    for row, parts in zip(rows, encode_pieces(rows, any_tokenizer), strict=True):
        assert list(parts[0]) == any_tokenizer(row[0].text, add_special_tokens=False)["input_ids"]


def test_text_is_kept_wherever_it_is_cut(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "The movie was\n\n terrible.  Ünï 映画"
    rows = [pieces(text[:cut], text[cut:]) for cut in range(len(text))]
    for parts in encode_pieces(rows, bytes_tokenizer):
        assert bytes_tokenizer.decode([token for part in parts for token in part]) == text


def test_cut_inside_a_token_never_uses_that_token(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    whole = bytes_tokenizer("movie", add_special_tokens=False)["input_ids"]
    (parts,) = encode_pieces([pieces("mov", "ie")], bytes_tokenizer)
    assert list(parts[0] + parts[1]) != whole, "the cut must matter here, or this test proves nothing"
    assert bytes_tokenizer.decode(parts[1]) == "ie"


def test_no_space_is_invented_in_the_middle(metaspace_tokenizer: PreTrainedTokenizerFast) -> None:
    (parts,) = encode_pieces([pieces("Review: ", "film")], metaspace_tokenizer)
    alone = metaspace_tokenizer("film", add_special_tokens=False)["input_ids"]
    assert metaspace_tokenizer.convert_ids_to_tokens(alone)[0].startswith("▁")
    assert not metaspace_tokenizer.convert_ids_to_tokens(parts[1])[0].startswith("▁")


def test_no_rows_give_no_ids(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_pieces([], bytes_tokenizer) == []
