"""Where rows come from: a packaged data set, a local file, or a data hub."""

import math
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeGuard

from prefixkit.config import DataConfig, Format
from prefixkit.data.hub import hub_records
from prefixkit.data.packaged import PACKAGED_DATASETS
from prefixkit.data.readers import is_file_name, read_records
from prefixkit.data.rows import ASSISTANT, Message, Row, label_name
from prefixkit.errors import DataError, did_you_mean
from prefixkit.logs import get_logger
from prefixkit.texts import is_unicode

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MOST_LABELS_SHOWN = 10
_NO_LABEL = -100

log = get_logger(__name__)


def load_rows(config: DataConfig) -> list[Row]:
    """Read the rows a recipe names, in the order of the source, before any filter.

    Raises:
        DataError: the source does not exist or is empty, a column is missing, a row's text, pair,
            conversation or label is missing or of the wrong type, or `keep_label` never occurs. The message
            is one line and says which row.
    """
    records = iter(islice(_records(config), config.stream_head) if config.stream else
                   _spread(_records(config), config.max_rows))  # fmt: skip
    first = next(records, None)
    if first is None:
        raise DataError(f"{config.source}: no rows in it")
    # Files of objects may leave a column out of a row; the first row decides whether the column exists at
    # all.
    _check_columns(config, first)
    whole = enumerate(chain([first], records), start=1)
    rows = [row for number, record in whole for row in _rows(config, record, number)]
    _check_label(config, rows)
    log.info("%s: %d rows read", config.source, len(rows))
    return rows


def rows_behind(config: DataConfig, records: int) -> Iterator[Row]:
    """Yield the rows of a source behind so many of its records, one after the other, before any filter.

    Raises:
        DataError: as for `load_rows`, but for what only all rows together can show.
    """
    for number, record in enumerate(_records(config, records), start=records + 1):
        yield from _rows(config, record, number)


def _spread(records: Iterable[dict[str, Any]], most: int | None) -> Iterable[dict[str, Any]]:
    """Return at most so many records, evenly spaced: the first ones of a file sorted by label have one label."""
    if most is None:
        return records
    whole = list(records)
    return whole if len(whole) <= most else [whole[place * len(whole) // most] for place in range(most)]


def kept_label(config: DataConfig) -> str | None:
    """Return the name of the label to learn from, as `Row.label` has it; None keeps every row."""
    return None if config.keep_label is None else label_name(config.keep_label)


def _records(config: DataConfig, skipped: int = 0) -> Iterable[dict[str, Any]]:
    source = config.source
    if source in PACKAGED_DATASETS:
        return islice(PACKAGED_DATASETS[source].records(), skipped, None)
    path = Path(os.path.expanduser(source))  # leaves an unknown ~user alone, where Path raises
    if path.exists() or is_file_name(source) or not _HUB_ID.fullmatch(source):
        return islice(read_records(path), skipped, None)
    return hub_records(config, skipped)


def _wanted_columns(config: DataConfig) -> dict[str, str]:
    """Setting name to column name."""
    match config.format:
        case Format.TEXT | Format.CLASSES | Format.TAGS:
            columns = {"text_column": config.text_column}
        case Format.INPUT_TARGET:
            columns = {"input_column": config.input_column, "target_column": config.target_column}
        case Format.MESSAGES:
            columns = {"messages_column": config.messages_column}
    return columns | ({"label_column": config.label_column} if config.label_column else {})


def _check_columns(config: DataConfig, record: dict[str, Any]) -> None:
    for setting, column in _wanted_columns(config).items():
        if column not in record:
            hint = did_you_mean(column, record)
            raise DataError(
                f'data.{setting}: {config.source} has no column "{column}"{hint or ";"} '
                f"columns: {', '.join(record) or 'none'}"
            )


def _rows(config: DataConfig, record: dict[str, Any], number: int) -> list[Row]:
    """Return what a record teaches: one row, or one per target where it lists several."""
    where = f"{config.source}, row {number}"
    if config.format is Format.TAGS:
        return [_tagged(config, record, number, where)]
    label = None
    if config.label_column:
        value = record.get(config.label_column)
        if not _is_label(value):
            raise DataError(f'{where}: column "{config.label_column}" holds {_kind(value)}, expected a label')
        label = label_name(value)
    match config.format:
        case Format.TEXT | Format.CLASSES:
            return [Row(number, text=_text(record, config.text_column, where), label=label)]
        case Format.INPUT_TARGET:
            given, column = _text(record, config.input_column, where), config.target_column
            targets = _texts(record.get(column), column, where)
            return [Row(number, input=given, target=target, label=label) for target in targets]
        case Format.MESSAGES:
            messages = _messages(record.get(config.messages_column), config.messages_column, where)
            return [Row(number, messages=messages, label=label)]


def _tagged(config: DataConfig, record: dict[str, Any], number: int, where: str) -> Row:
    """Return a row of words with a tag each."""
    assert config.label_column is not None
    words = _list(record, config.text_column, where, "words")
    tags = _list(record, config.label_column, where, "tags")
    if len(words) != len(tags):
        raise DataError(f"{where}: {len(words)} words and {len(tags)} tags; every word needs one tag")
    for place, (word, tag) in enumerate(zip(words, tags, strict=True), start=1):
        if not isinstance(word, str) or not is_unicode(word) or not word or any(map(str.isspace, word)):
            raise DataError(f"{where}: word {place} is {word!r}, expected text without white space")
        if not _is_label(tag):
            raise DataError(f"{where}: the tag of word {place} is {_kind(tag)}, expected a label such as O")
    return Row(number, words=tuple(words), tags=tuple(map(label_name, tags)))


def _list(record: dict[str, Any], column: str, where: str, what: str) -> list[Any]:
    values = record.get(column)
    if not isinstance(values, list) or not values:
        raise DataError(f'{where}: column "{column}" holds {_kind(values)}, expected a list of {what}')
    return values


def _is_label(value: Any) -> TypeGuard[str | int | float]:
    if isinstance(value, str):
        return bool(value.strip()) and is_unicode(value)
    # -100 is how data sets for other libraries say that there is no label here
    return isinstance(value, int | float) and not _is_nan(value) and value != _NO_LABEL


def _text(record: dict[str, Any], column: str, where: str) -> str:
    """Return a text; a list of sentences is put together."""
    return " ".join(_texts(record.get(column), column, where))


def _texts(value: Any, column: str, where: str) -> list[str]:
    """Return the texts of a column that holds one, or a list of them."""
    texts = value if isinstance(value, list) and value else [value]
    for text in texts:
        if not isinstance(text, str):
            inside = "a list with " if texts is value else ""
            raise DataError(f'{where}: column "{column}" holds {inside}{_kind(text)}, expected text')
        if not is_unicode(text):
            raise DataError(
                f'{where}: column "{column}" holds half a character (a lone surrogate); save the file as UTF-8'
            )
    return texts


def _messages(value: Any, column: str, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise DataError(
            f'{where}: column "{column}" holds {_kind(value)}, expected a list of {{role, content}} messages'
        )
    messages = []
    for turn, message in enumerate(value, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{where}: message {turn} is not a {{role, content}} pair of texts")
        if not is_unicode(content):
            raise DataError(
                f"{where}: message {turn} holds half a character (a lone surrogate); save the file as UTF-8"
            )
        messages.append(Message(role, content))
    if all(message.role != ASSISTANT for message in messages):
        raise DataError(f'{where}: no message of role "{ASSISTANT}", so nothing to learn from')
    return tuple(messages)


def _is_nan(value: Any) -> bool:
    """Whether a value is NaN, which is how tables write that there is none."""
    return isinstance(value, float) and math.isnan(value)


def _kind(value: Any) -> str:
    if value is None or _is_nan(value):
        return "nothing"
    if value == _NO_LABEL:
        return "-100, which says that there is none"
    return f"an empty {type(value).__name__}" if value in ("", [], {}) else f"a value of type {type(value).__name__}"


def _check_label(config: DataConfig, rows: list[Row]) -> None:
    wanted = kept_label(config)
    if wanted is None:
        return
    labels = sorted({row.label for row in rows if row.label is not None})
    also = [("learn_also", label_name(label)) for label in config.learn_also]
    named = [wanted, *(label for _, label in also)]
    if twice := next((label for label in named if named.count(label) > 1), None):
        raise DataError(f'data.learn_also: "{twice}" is learned already; name each label once')
    for setting, label in (("keep_label", wanted), *also):
        if label not in labels:
            shown = ", ".join(labels[:_MOST_LABELS_SHOWN])
            more = f" and {len(labels) - _MOST_LABELS_SHOWN} more" if len(labels) > _MOST_LABELS_SHOWN else ""
            of_head = f" of its first {config.stream_head} (data.stream_head)" if config.stream else ""
            raise DataError(
                f'data.{setting}: no row{of_head} of {config.source} has "{label}" in column "{config.label_column}"; '
                f"labels: {shown}{more}"
            )
