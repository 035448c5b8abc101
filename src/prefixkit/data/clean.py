"""Cleaning: web mark-up out of the texts."""

import html
import re
from dataclasses import replace

from prefixkit.data.rows import Message, Row

_LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)


def fold_whitespace(text: str) -> str:
    """Turn every run of white space into one space, none at the ends."""
    return " ".join(text.split())


def clean_text(text: str) -> str:
    """Unescape HTML entities, turn ``<br />`` into a space, and fold white space."""
    return fold_whitespace(_LINE_BREAK.sub(" ", html.unescape(text)))


def clean_row(row: Row) -> Row:
    """Clean every text of a row; its number and label stay, and so do words that have a tag each."""
    return replace(
        row,
        text=None if row.text is None else clean_text(row.text),
        input=None if row.input is None else clean_text(row.input),
        target=None if row.target is None else clean_text(row.target),
        messages=tuple(Message(message.role, clean_text(message.content)) for message in row.messages),
    )
