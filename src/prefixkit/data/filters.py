"""Which rows of a split are used: those of the label that is learned, and of the length that is wanted."""

from collections.abc import Iterable
from dataclasses import dataclass

from prefixkit.config import DataConfig
from prefixkit.data.rows import Row


@dataclass(frozen=True)
class Filtered:
    """Rows through the filters, and how many each filter took.

    Attributes:
        rows: those that are left.
        other_label: rows of other labels.
        too_short: rows of the label with fewer words than `min_words`.
        too_long: rows of the label with more words than `max_words`.
    """

    rows: tuple[Row, ...]
    other_label: int
    too_short: int
    too_long: int


def filter_rows(rows: Iterable[Row], config: DataConfig, label: str | None) -> Filtered:
    """Keep the rows of a label (of any, if None) that are neither too short nor too long."""
    kept = []
    other_label = too_short = too_long = 0
    for row in rows:
        if label is not None and row.label != label:
            other_label += 1
            continue
        words = len(row.learned.split())
        if words < config.min_words:
            too_short += 1
        elif config.max_words is not None and words > config.max_words:
            too_long += 1
        else:
            kept.append(row)
    return Filtered(tuple(kept), other_label, too_short, too_long)
