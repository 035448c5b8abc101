"""Which rows of the training split are learned from: the clear ones, some of them, other labels' beside them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefixkit.config import DataConfig
from prefixkit.data.clearest import clearest_rows
from prefixkit.data.filters import filter_rows
from prefixkit.data.rows import Row, label_name
from prefixkit.seeding import derive

#: English text has about this many words per token of the usual vocabularies.
WORDS_PER_TOKEN = 0.75


@dataclass(frozen=True)
class Chosen:
    """Training rows, in the order of the source, and how many were left out as unclear."""

    rows: tuple[Row, ...]
    unclear: int


def choose_rows(kept: Sequence[Row], others: Sequence[Row], config: DataConfig) -> Chosen:
    """Choose what is learned from.

    Args:
        kept: training rows of the label that is learned, through the filters.
        others: training rows of other labels, before the filters.
        config: the recipe's data section.
    """
    clear = clearest_rows(kept, others, share=config.clearest, words=round(config.max_tokens * WORDS_PER_TOKEN))
    rows = list(draw_rows(clear, config.train_rows, config.subset_seed))
    for label in config.learn_also:
        of_label = filter_rows(others, config, label_name(label)).rows
        rows += draw_rows(of_label, config.train_rows, config.subset_seed)
    return Chosen(tuple(sorted(rows, key=lambda row: row.number)), len(kept) - len(clear))


def draw_rows(rows: Sequence[Row], most: int | None, seed: int) -> tuple[Row, ...]:
    """Return at most so many rows, in the order they had.

    A larger draw of the same seed holds every row of a smaller one, so that draws differ by no more than their size.

    Args:
        rows: what is drawn from.
        most: how many; None for all.
        seed: of the draw.
    """
    if most is None or most >= len(rows):
        return tuple(rows)
    order = np.random.default_rng(derive(seed, "data.subset")).permutation(len(rows))
    return tuple(rows[place] for place in sorted(order[:most].tolist()))
