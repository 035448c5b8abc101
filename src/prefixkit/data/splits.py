"""Duplicates out, then splits by the hash of the text, so that nothing leaks from one split to another.

A row's split depends on what it says and on the configured shares alone: not on the rest of the file, its
order, the row's label or any seed. Adding rows to a file never moves a row from test to train.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from prefixkit.config import SplitConfig
from prefixkit.data.rows import Row
from prefixkit.texts import fold_whitespace


class Split(StrEnum):
    """What a row is for."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"
    JUDGE = "judge"


@dataclass(frozen=True)
class DistinctRows:
    """Rows of which no two say the same.

    Attributes:
        rows: the first row of each content, in the order given.
        duplicates: later copies left out.
        contradictory: rows left out, all copies, because the same content came with different labels.
    """

    rows: tuple[Row, ...]
    duplicates: int
    contradictory: int


def content_hash(text: str) -> bytes:
    """Return the SHA-256 of a text, blind to case and to white space."""
    return hashlib.sha256(fold_whitespace(text).casefold().encode("utf-8", "surrogatepass")).digest()


def distinct_rows(rows: Iterable[Row]) -> DistinctRows:
    """Keep the first of every group of duplicates, and none of a group that contradicts itself."""
    groups: dict[bytes, list[Row]] = {}
    for row in rows:
        groups.setdefault(content_hash(row.content), []).append(row)
    agreed = [group for group in groups.values() if len({row.labels for row in group}) == 1]
    total = sum(map(len, groups.values()))
    in_agreement = sum(map(len, agreed))
    return DistinctRows(
        rows=tuple(group[0] for group in agreed),
        duplicates=in_agreement - len(agreed),
        contradictory=total - in_agreement,
    )


def split_of(row: Row, shares: SplitConfig) -> Split:
    """Return the split of a row: its content's hash, read as a number in [0, 1), against the shares.

    Rows with the same input (or the same opening of a conversation) share a split whatever their targets.
    """
    place = int.from_bytes(content_hash(row.split_key)[:8], "big") / 2**64
    # Test comes first and train last: changing another share then leaves the test rows where they are.
    for split, share in (
        (Split.TEST, shares.test),
        (Split.VALIDATION, shares.validation),
        (Split.JUDGE, shares.judge),
    ):
        if place < share:
            return split
        place -= share
    return Split.TRAIN


def split_rows(rows: Iterable[Row], shares: SplitConfig) -> dict[Split, tuple[Row, ...]]:
    """Return the rows of every split, each in the order given."""
    members: dict[Split, list[Row]] = {split: [] for split in Split}
    for row in rows:
        members[split_of(row, shares)].append(row)
    return {split: tuple(found) for split, found in members.items()}
