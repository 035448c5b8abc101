"""The held-out texts of a recipe at full length: what a finished prefix is looked at with."""

from transformers import PreTrainedTokenizerBase

from prefixkit.config import DataConfig
from prefixkit.data.clean import clean_row
from prefixkit.data.examples import Example, build_examples
from prefixkit.data.sources import kept_label, load_rows
from prefixkit.data.splits import Split, distinct_rows, split_of
from prefixkit.errors import DataError


def heldout_texts(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, count: int
) -> tuple[Example, ...]:
    """Return test rows of the label learned, cut at `max_tokens`; those longer than training texts may be included.

    A row's split depends on its content alone, so these rows were not trained on.

    Args:
        config: the recipe's data section; its `max_words` and `max_tokens` do not count here.
        tokenizer: the base model's.
        max_tokens: the first rows that reach this are taken, then the longest of the others.
        count: most rows to take.

    Raises:
        DataError: the source is not usable (see `load_rows`), it has no such row, or the recipe learns labels.
    """
    if config.format.is_classified:
        raise DataError(f"data.format: a run of format {config.format} learns labels, and has no texts to predict")
    rows = load_rows(config)
    label = kept_label(config)
    test = [
        row
        for row in distinct_rows(map(clean_row, rows) if config.clean_html else rows).rows
        if split_of(row, config.split) is Split.TEST
        and (label is None or row.label == label)
        and len(row.learned.split()) >= config.min_words
    ]
    wide = config.model_copy(update={"max_tokens": max_tokens, "max_words": None, "truncate": True})
    examples = build_examples(test, wide, tokenizer).examples
    if not examples:
        raise DataError(
            f"{config.source}: none of {len(rows)} rows is a held-out text of this recipe; check data.split"
        )
    return tuple(sorted(examples, key=lambda example: -len(example.input_ids))[:count])
