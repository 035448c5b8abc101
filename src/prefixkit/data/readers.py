"""Local files, row by row: JSON lines, JSON, CSV, TSV, Parquet and plain text, gzipped or not."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from prefixkit.errors import DataError, did_you_mean

_LONGEST_FIELD = 2**31 - 1
"""Characters; Python's default of 131,072 is shorter than a long article."""


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file as column name to value.

    The extension decides the format, ``.gz`` after it is unpacked on the way. CSV values are all text; a
    plain text file has one row per non-empty line, in a column called ``text``.

    Raises:
        DataError: the file is missing, a folder, of an unknown extension, not UTF-8, damaged, or a line of it
            is malformed (the message says which).
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file in it")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    reader = _READERS[file_format(path)]
    try:
        yield from reader(path)
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path}: not a complete gzip file") from None
    except PermissionError:
        raise DataError(f"{path}: no permission to read it") from None


def file_format(path: Path) -> str:
    """Return the extension that decides the format, without a trailing ``.gz``.

    Raises:
        DataError: no reader knows the extension.
    """
    name = path.name.lower()
    is_zipped = name.endswith(".gz")
    extension = Path(name.removesuffix(".gz")).suffix
    if extension not in _READERS or (is_zipped and extension == ".parquet"):
        shown = f"{extension}.gz" if is_zipped else extension
        hint = did_you_mean(shown, _READERS) or f"; expected {', '.join(_READERS)}"
        raise DataError(f"{path}: unknown extension {shown!r}{hint}")
    return extension


def is_file_name(name: str) -> bool:
    """Tell whether a source looks like a file prefixkit reads, an extension that is merely misspelt included."""
    extension = Path(name.lower().removesuffix(".gz")).suffix
    return extension in _READERS or bool(extension and did_you_mean(extension, _READERS))


def _open_text(path: Path, newline: str | None = None) -> TextIOWrapper:
    # utf-8-sig drops the byte-order mark that spreadsheets write and that would become part of a column's
    # name.
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not valid JSON: {error.msg}") from None
            yield _object(record, f"{path}, line {number}")


def _read_json(path: Path) -> Iterator[dict[str, Any]]:
    with _open_text(path) as file:
        text = file.read()
    if not text.strip():
        return
    try:
        records = json.loads(text)
    except RecursionError:
        raise DataError(f"{path}: nested too deeply; expected a list of flat objects") from None
    except json.JSONDecodeError as error:
        hint = "; one object per line belongs in a .jsonl file" if error.msg == "Extra data" else ""
        raise DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}{hint}") from None
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a list of objects, got {type(records).__name__}")
    for number, record in enumerate(records, start=1):
        yield _object(record, f"{path}, row {number}")


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f'{where}: expected an object such as {{"text": "..."}}, got {type(record).__name__}')
    return record


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[dict[str, Any]]:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))  # global: another file may be read meanwhile
    with _open_text(path, newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            names = reader.fieldnames or []
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise DataError(f"{path}: has two columns called {twice!r}; rename one")
            for record in reader:
                if None in record:
                    raise DataError(
                        f"{path}, line {reader.line_num}: more fields than the "
                        f"header's {len(names)}; quote a text that holds the delimiter"
                    )
                if delimiter == "\t" and any("\n" in text and "\t" in text for text in record.values() if text):
                    raise DataError(
                        f"{path}, line {reader.line_num}: a field holds tabs and line breaks, as if a quote at its "
                        "beginning were no part of the text; write the table as .csv or .jsonl"
                    )
                yield record
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from None


def _read_tsv(path: Path) -> Iterator[dict[str, Any]]:
    yield from _read_csv(path, delimiter="\t")


def _read_text(path: Path) -> Iterator[dict[str, Any]]:
    with _open_text(path) as file:
        for line in file:
            if line.strip():
                yield {"text": line.rstrip("\n")}


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, pyarrow.ArrowIOError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


_READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
