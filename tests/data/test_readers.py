"""Every format yields the same rows; every damage is one clear line."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from prefixkit.data.readers import read_records
from prefixkit.errors import DataError

ROWS = [{"text": 'a "quoted", long text', "label": "1"}, {"text": "Ünïcode 映画\nline two", "label": "0"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        parquet.write_table(pa.Table.from_pylist(rows), path)
        return path
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if name.endswith(".jsonl"):
            file.write("\n\n".join(json.dumps(row) for row in rows))
        elif name.endswith(".json"):
            json.dump(rows, file)
        else:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def failure(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "name", ["r.jsonl", "r.json", "r.csv", "r.tsv", "r.parquet", "r.jsonl.gz", "r.csv.gz", "R Ü 映.CSV"]
)
def test_formats_agree(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    target = path if name != "R Ü 映.CSV" else tmp_path / "lower.csv"
    write(target, ROWS)
    target.rename(path)
    assert list(read_records(path)) == ROWS


def test_plain_text_has_a_row_per_line(tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_text("one\n\n  \ntwo\n", encoding="utf-8")
    assert list(read_records(path)) == [{"text": "one"}, {"text": "two"}]


def test_byte_order_mark_is_no_part_of_a_column(tmp_path: Path) -> None:
    path = tmp_path / "sheet.csv"
    path.write_bytes(b"\xef\xbb\xbftext\nhello\n")
    assert list(read_records(path)) == [{"text": "hello"}]


def test_very_long_field_is_read_and_the_global_limit_restored(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    rows = [{"text": "x" * 300_000}]
    assert list(read_records(write(tmp_path / "long.csv", rows))) == rows
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["e.jsonl", "e.json", "e.csv", "e.txt"])
def test_empty_file_has_no_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert list(read_records(tmp_path / name)) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "line 3: not valid JSON: Expecting value"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', 'line 2: expected an object such as {"text": "..."}, got list'),
        ("a.json", b'[{"text": "x"},\n}]', "line 2: not valid JSON"),
        ("a.json", b'{"a": 1}\n{"a": 2}', "one object per line belongs in a .jsonl file"),
        ("a.json", b'{"a": 1}', "expected a list of objects, got dict"),
        ("a.json", b"[1]", "row 1: expected an object"),
        ("a.csv", b"text,label\na,b,c\n", "line 2: more fields than the header's 2; quote a text"),
        ("a.csv", b'text\n"open\n', "not valid CSV: unexpected end of data"),
        ("a.csv", b"text\n\xff\xfe\n", "not UTF-8 text; save it as UTF-8"),
        ("a.jsonl.gz", b"plain", "not a complete gzip file"),
        ("a.csv.gz", gzip.compress(b"text\nhello\n" * 99, mtime=0)[:-12], "not a complete gzip file"),
        ("a.parquet", b"plain", "not a readable Parquet file"),
        ("a.jsonll", b"", "unknown extension '.jsonll'; did you mean \".jsonl\"?"),
        ("a.csv", b"text,label,text\nfirst,1,second\n", "has two columns called 'text'; rename one"),
        (
            "a.tsv",
            b'text\tlabel\n"Oh no\t0\nfine film\t1\ngood "\t1\n',
            "line 4: a field holds tabs and line breaks, as if a quote at its beginning were no part of the text",
        ),
        ("a.xlsx", b"", "unknown extension '.xlsx'; expected .jsonl, .json, .csv, .tsv, .parquet, .txt"),
        ("a.parquet.gz", b"", "unknown extension '.parquet.gz'"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    said = failure(path)
    assert said.startswith(str(path))
    assert message in said


def test_missing_file_and_folder_are_told_apart(tmp_path: Path) -> None:
    assert failure(tmp_path / "no.csv") == f"{tmp_path / 'no.csv'}: no such file"
    assert failure(tmp_path) == f"{tmp_path}: is a folder; name a file in it"


def test_a_file_that_may_not_be_read_is_said_to_be_one(tmp_path, monkeypatch):
    path = tmp_path / "secret.txt"
    path.write_text("a review", encoding="utf-8")

    def refuse(*_, **__):
        raise PermissionError

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="secret.txt: no permission to read it"):
        list(read_records(path))


def test_two_files_with_long_fields_are_read_by_turns(tmp_path: Path) -> None:
    """The csv module's limit on a field is global."""
    long = "x" * 200_000
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text(f"text\n{long}\n{long}\n", encoding="utf-8")
    one, other = read_records(tmp_path / "a.csv"), read_records(tmp_path / "b.csv")
    assert next(one) == next(other) == {"text": long}
    assert list(one) == [{"text": long}]
    assert list(other) == [{"text": long}]
