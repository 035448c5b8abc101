"""The held-out texts of a recipe at full length: what a finished prefix is looked at with."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from prefixkit.config import DataConfig, Format
from prefixkit.data.clean import clean_row
from prefixkit.data.examples import NO_LOSS, Example, build_examples
from prefixkit.data.rows import Row
from prefixkit.data.sources import kept_label, load_rows
from prefixkit.data.splits import Split, distinct_rows, split_of
from prefixkit.errors import DataError
from prefixkit.models.reading import read_texts, read_words


def heldout_texts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    count: int,
    start: int | None = None,
    reads_both_ways: bool = False,
) -> tuple[Example, ...]:
    """Return test rows of the label learned, cut at `max_tokens`; those longer than training texts may be included.

    A row's split depends on its content alone, so these rows were not trained on. Where labels are learned, rows of all
    labels are taken, and the examples have no loss.

    Args:
        config: the recipe's data section; its `max_words` and `max_tokens` do not count here.
        tokenizer: the base model's.
        max_tokens: the first rows that reach this are taken, then the longest of the others. An encoder-decoder's row
            is as long as the longer of its two texts.
        count: most rows to take.
        start: for an encoder-decoder, the token its decoder starts from.
        reads_both_ways: whether the base model is an encoder.

    Raises:
        DataError: the source is not usable (see `load_rows`), or it has no such row.
    """
    rows = load_rows(config)
    label = kept_label(config)
    test = [
        row
        for row in distinct_rows(map(clean_row, rows) if config.clean_html else rows).rows
        if split_of(row, config.shares) is Split.TEST
        and (label is None or row.label == label)
        and len(row.learned.split()) >= config.min_words
    ]
    wide = config.model_copy(update={"max_tokens": max_tokens, "max_words": None, "truncate": True})
    if config.format.is_classified:
        examples = _unlabelled(test, wide, tokenizer, reads_both_ways)
    else:
        examples = build_examples(test, wide, tokenizer, start=start).examples
    if not examples:
        raise DataError(
            f"{config.source}: none of {len(rows)} rows is a held-out text of this recipe; check data.split"
        )
    return tuple(sorted(examples, key=lambda example: -example.longest)[:count])


def _unlabelled(
    rows: Sequence[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase, reads_both_ways: bool
) -> tuple[Example, ...]:
    """Return what is read of rows that have labels."""
    if config.format is Format.TAGS:
        readings = read_words([row.words for row in rows], tokenizer, max_tokens=config.max_tokens)
    else:
        texts = [row.learned for row in rows]
        readings = read_texts(texts, tokenizer, reads_both_ways=reads_both_ways, max_tokens=config.max_tokens)
    return tuple(
        Example("", row.learned, reading.ids, (NO_LOSS,) * len(reading.ids))
        for row, reading in zip(rows, readings, strict=True)
    )
