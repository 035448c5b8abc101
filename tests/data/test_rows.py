"""What a row says, and what its label is called."""

import pytest

from prefixkit.data import Message, Row, label_name


@pytest.mark.parametrize(
    ("value", "name"),
    [(1, "1"), ("1", "1"), (1.0, "1"), ("1.0", "1"), (-1, "-1"), ("-1.00", "-1"), (True, "true"),
     ("True", "true"), ("FALSE", "false"), (" pos ", "pos"), ("1.5", "1.5"), ("v1.0", "v1.0")],
)  # fmt: skip
def test_labels_are_named_alike_however_a_file_types_them(value: object, name: str) -> None:
    assert label_name(value) == name  # type: ignore[arg-type]


def test_pairs_with_the_same_words_cut_elsewhere_differ() -> None:
    assert Row(1, input="a b", target="c").content != Row(2, input="a", target="b c").content


def test_what_is_given_decides_the_split_of_pairs_and_conversations() -> None:
    assert Row(1, text="film").split_key == "film"
    assert Row(1, input="in", target="out").split_key == "in"
    ask, other = Message("user", "why"), Message("assistant", "so")
    first, second = Row(1, messages=(ask, other)), Row(2, messages=(ask, Message("assistant", "because")))
    assert first.split_key == second.split_key
    assert first.content != second.content


def test_learned_is_what_the_loss_is_on() -> None:
    talk = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    assert Row(1, messages=talk).learned == "b\nd"
    assert Row(1, input="in", target="out").learned == "out"


def test_the_last_reply_is_the_assistants_last_turn_whatever_follows_it() -> None:
    talk = (Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"), Message("user", "e"))
    assert Row(1, messages=talk).last_reply == "d"
    assert Row(1, input="in", target="out").last_reply is None
