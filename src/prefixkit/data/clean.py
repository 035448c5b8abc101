"""Cleaning: web mark-up out of the rows."""

from dataclasses import replace

from prefixkit.data.rows import Message, Row
from prefixkit.texts import clean_text


def clean_row(row: Row) -> Row:
    """Clean every text of a row; its number and label stay, and so do words that have a tag each."""
    return replace(
        row,
        text=None if row.text is None else clean_text(row.text),
        input=None if row.input is None else clean_text(row.input),
        target=None if row.target is None else clean_text(row.target),
        messages=tuple(Message(message.role, clean_text(message.content)) for message in row.messages),
    )
