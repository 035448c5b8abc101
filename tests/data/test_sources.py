"""Rows from packages, files and hubs; what is missing is named, with its row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefixkit.config import DataConfig, Format
from prefixkit.data import Message, Row, load_rows
from prefixkit.data.packaged import dataset
from prefixkit.errors import DataError

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_each_format_fills_its_own_fields(write_jsonl: Callable[..., str]) -> None:
    path = write_jsonl([{"text": "t", "input": "i", "target": "o", "messages": TALK, "label": 1}])
    assert load_rows(DataConfig(source=path, label_column="label")) == [Row(1, text="t", label="1")]
    assert load_rows(DataConfig(source=path, format=Format.INPUT_TARGET)) == [Row(1, input="i", target="o")]
    talk = (Message("user", "Hi"), Message("assistant", "Hello"))
    assert load_rows(DataConfig(source=path, format=Format.MESSAGES)) == [Row(1, messages=talk)]


def test_labels_to_learn_stand_beside_a_text_or_beside_its_words(
    failure: Callable[..., str], write_jsonl: Callable[..., str]
) -> None:
    path = write_jsonl([{"text": "a b", "words": ["a", "b"], "label": 1.0, "tags": ["O", 2.0]}])
    classes = DataConfig(source=path, format=Format.CLASSES, label_column="label")
    assert load_rows(classes) == [Row(1, text="a b", label="1")]
    tags = DataConfig(source=path, format=Format.TAGS, text_column="words", label_column="tags")
    assert load_rows(tags) == [Row(1, words=("a", "b"), tags=("O", "2"))]
    assert failure(source=path, format=Format.TAGS, label_column="tag") == (
        f'data.label_column: {path} has no column "tag"; did you mean "tags"? columns: text, words, label, tags'
    )


def test_max_rows_are_spread_over_the_source(write_jsonl: Callable[..., str]) -> None:
    """A file sorted by label keeps all its labels."""
    path = write_jsonl([{"text": letter} for letter in "abcdefg"])
    assert [row.text for row in load_rows(DataConfig(source=path, max_rows=3))] == ["a", "c", "e"]
    assert [len(load_rows(DataConfig(source=path, max_rows=most))) for most in (7, 99)] == [7, 7]


@pytest.mark.parametrize("label", [float("nan"), "", "  ", None])
def test_a_row_without_a_label_is_refused(write_jsonl: Callable[..., str], label: object) -> None:
    path = write_jsonl([{"text": "a", "label": 1.0}, {"text": "b", "label": label}])
    with pytest.raises(DataError, match=r'row 2: column "label" holds .*, expected a label'):
        load_rows(DataConfig(source=path, label_column="label"))


def test_half_a_character_is_refused_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "cut \\ud83d"}\n')
    with pytest.raises(DataError, match=r'row 2: column "text" holds half a character \(a lone surrogate\)'):
        load_rows(DataConfig(source=str(path)))


def test_an_unknown_home_is_a_missing_file() -> None:
    with pytest.raises(DataError, match="~nosuchuser/x.csv: no such file"):
        load_rows(DataConfig(source="~nosuchuser/x.csv"))


@pytest.mark.parametrize("keep_label", ["1", 1])
@pytest.mark.parametrize("stored", ["1", 1, 1.0])
def test_keep_label_meets_the_column_however_it_is_typed(
    write_jsonl: Callable[..., str], keep_label: str | int, stored: str | int | float
) -> None:
    path = write_jsonl([{"text": "a", "label": stored}])
    config = DataConfig(source=path, label_column="label", keep_label=keep_label)
    assert load_rows(config)[0].label == "1"


def test_true_in_a_recipe_meets_true_in_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "flags.csv"
    path.write_text("text,good\na,True\nb,False\n", encoding="utf-8")
    rows = load_rows(DataConfig(source=str(path), label_column="good", keep_label=True))
    assert [row.label for row in rows] == ["true", "false"]


def test_missing_column_lists_those_there_are(failure: Callable[..., str], write_jsonl: Callable[..., str]) -> None:
    path = write_jsonl([{"texts": "a", "stars": 1}])
    assert failure(source=path) == (
        f'data.text_column: {path} has no column "text"; did you mean "texts"? columns: texts, stars'
    )
    assert failure(source=path, text_column="texts", label_column="kind") == (
        f'data.label_column: {path} has no column "kind"; columns: texts, stars'
    )
    said = failure(source=path, format=Format.INPUT_TARGET)
    assert said.startswith(f'data.input_column: {path} has no column "input"')


@pytest.mark.parametrize(("value", "kind"), [(None, "nothing"), (5, "a value of type int"), ([], "an empty list")])
def test_row_without_text_is_named(
    failure: Callable[..., str], write_jsonl: Callable[..., str], value: Any, kind: str
) -> None:
    path = write_jsonl([{"text": "a"}, {"text": value}])
    assert failure(source=path) == f'{path}, row 2: column "text" holds {kind}, expected text'


def test_column_that_only_one_row_lacks_is_that_rows_fault(
    failure: Callable[..., str], write_jsonl: Callable[..., str]
) -> None:
    path = write_jsonl([{"text": "a"}, {"other": "b"}])
    assert failure(source=path) == f'{path}, row 2: column "text" holds nothing, expected text'


@pytest.mark.parametrize("value", [None, "", {}])
def test_row_without_label_is_named(failure: Callable[..., str], write_jsonl: Callable[..., str], value: Any) -> None:
    path = write_jsonl([{"text": "a", "label": value}])
    assert f'{path}, row 1: column "label" holds' in failure(source=path, label_column="label")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Hi", "holds a value of type str, expected a list of {role, content} messages"),
        ([], "holds an empty list, expected a list of {role, content} messages"),
        ([{"role": "user"}], "message 1 is not a {role, content} pair of texts"),
        ([TALK[0], "Hello"], "message 2 is not a {role, content} pair of texts"),
        ([TALK[0]], 'no message of role "assistant", so nothing to learn from'),
    ],
)
def test_bad_conversation_is_named(
    failure: Callable[..., str], write_jsonl: Callable[..., str], value: Any, message: str
) -> None:
    path = write_jsonl([{"messages": TALK}, {"messages": value}])
    said = failure(source=path, format=Format.MESSAGES)
    assert said.startswith(f"{path}, row 2: ")
    assert message in said


@pytest.mark.parametrize(
    ("words", "tags", "message"),
    [
        ("a b", ["O", "O"], 'column "text" holds a value of type str, expected a list of words'),
        ([], [], 'column "text" holds an empty list, expected a list of words'),
        (None, ["O"], 'column "text" holds nothing, expected a list of words'),
        (["a"], "O", 'column "label" holds a value of type str, expected a list of tags'),
        (["a"], [], 'column "label" holds an empty list, expected a list of tags'),
        (["a", "b"], ["O"], "2 words and 1 tags; every word needs one tag"),
        (["a", "New York"], ["O", "O"], "word 2 is 'New York', expected text without white space"),
        (["a\u00a0"], ["O"], "word 1 is 'a\\xa0', expected text without white space"),
        ([""], ["O"], "word 1 is '', expected text without white space"),
        (["a", 5], ["O", "O"], "word 2 is 5, expected text without white space"),
        (["\ud83d"], ["O"], "word 1 is '\\ud83d', expected text without white space"),
        (["a", "b"], ["O", None], "the tag of word 2 is nothing, expected a label such as O"),
        (["a"], [" "], "the tag of word 1 is a value of type str, expected a label such as O"),
        (["a"], [["O"]], "the tag of word 1 is a value of type list, expected a label such as O"),
    ],
)
def test_words_and_tags_that_do_not_match_are_named(
    failure: Callable[..., str], write_jsonl: Callable[..., str], words: Any, tags: Any, message: str
) -> None:
    path = write_jsonl([{"text": ["a"], "label": ["O"]}, {"text": words, "label": tags}])
    assert failure(source=path, format=Format.TAGS, label_column="label") == f"{path}, row 2: {message}"


def test_a_table_of_text_has_no_words_to_tag(failure: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "tags.csv"
    path.write_text("text,label\n\"['a', 'b']\",\"['O', 'O']\"\n", encoding="utf-8")
    assert failure(source=str(path), format=Format.TAGS, label_column="label") == (
        f'{path}, row 1: column "text" holds a value of type str, expected a list of words'
    )


def test_label_that_never_occurs_lists_those_that_do(
    failure: Callable[..., str], write_jsonl: Callable[..., str]
) -> None:
    path = write_jsonl([{"text": "a", "label": f"l{i:02}"} for i in range(12)])
    said = failure(source=path, label_column="label", keep_label="positive")
    assert said == (
        f'data.keep_label: no row of {path} has "positive" in column "label"; '
        "labels: l00, l01, l02, l03, l04, l05, l06, l07, l08, l09 and 2 more"
    )


def test_empty_and_missing_files_are_told_apart(failure: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty.csv").touch()
    assert failure(source=str(tmp_path / "empty.csv")) == f"{tmp_path / 'empty.csv'}: no rows in it"
    assert failure(source=str(tmp_path / "no.csv")) == f"{tmp_path / 'no.csv'}: no such file"
    assert failure(source="reviews.csv.gz") == "reviews.csv.gz: no such file"
    assert failure(source="reviews.jsnl") == "reviews.jsnl: no such file"  # no hub is asked for a misspelt extension
    assert failure(source="some folder/file") == "some folder/file: no such file"


def test_packaged_reviews_are_the_imdb_rows_with_labels_in_words(
    failure: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "combined.csv"
    path.write_text("text,label,source\ngood,1,imdb\nbad,0,imdb\nterse,1,rotten_tomatoes\n", encoding="utf-8")
    monkeypatch.setattr(dataset, "fetch_package_file", lambda file, *, error: path)
    rows = load_rows(DataConfig(label_column="label"))
    assert rows == [Row(1, text="good", label="positive"), Row(2, text="bad", label="negative")]
    assert failure(text_column="source").endswith("columns: text, label")
    path.write_text("text,label,source\ngood,5,imdb\n", encoding="utf-8")
    assert "unknown label '5' in the packaged file, expected one of 0, 1" in failure(label_column="label")


def test_a_tag_that_says_there_is_none_is_no_label(write_jsonl: Callable[..., str]) -> None:
    source = write_jsonl([{"text": ["a", "b"], "label": [1, -100]}])
    with pytest.raises(DataError) as caught:
        load_rows(DataConfig(source=source, format="tags", label_column="label"))
    assert str(caught.value).endswith(
        "row 1: the tag of word 2 is -100, which says that there is none, expected a label such as O"
    )


def test_sentences_are_put_together_and_each_target_is_a_row(write_jsonl: Callable[..., str]) -> None:
    source = write_jsonl([
        {"input": ["One.", "Two."], "target": ["a", "b"], "text": ["So it", "goes."]},
        {"input": "Three.", "target": "c", "text": "As ever."},
    ])  # fmt: skip
    assert load_rows(DataConfig(source=source, format="input_target")) == [
        Row(1, input="One. Two.", target="a"),
        Row(1, input="One. Two.", target="b"),
        Row(2, input="Three.", target="c"),
    ]
    assert [row.text for row in load_rows(DataConfig(source=source))] == ["So it goes.", "As ever."]


@pytest.mark.parametrize(
    ("value", "kind"),
    [(["a", 5], "a list with a value of type int"), (["a", None], "a list with nothing"), ([], "an empty list")],
)
def test_a_list_that_is_not_of_texts_is_named(
    failure: Callable[..., str], write_jsonl: Callable[..., str], value: Any, kind: str
) -> None:
    source = write_jsonl([{"input": "a", "target": value}])
    assert failure(source=source, format="input_target").endswith(f'row 1: column "target" holds {kind}, expected text')
