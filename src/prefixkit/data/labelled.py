"""Examples whose labels are classes: one for a whole text, or one for each word.

`labels[i]` is the number of a class where the classification head looks at the hidden state of position i, and -100
elsewhere. Nothing is shifted: a class belongs to the place it stands at.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from prefixkit.config import DataConfig, Format
from prefixkit.data.examples import NO_LOSS, BuiltExamples, Example
from prefixkit.data.rows import Row
from prefixkit.errors import DataError
from prefixkit.models.reading import read_texts, read_words


def class_names(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the labels that occur, sorted.

    Raises:
        DataError: there are fewer than two.
    """
    names = sorted({label for row in rows for label in row.labels})
    if len(names) < 2:
        raise DataError(f"data.label_column: every row says {names[0]!r}; there must be two labels to tell apart")
    return tuple(names)


def build_labelled(
    rows: Sequence[Row],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    reads_both_ways: bool,
) -> BuiltExamples:
    """Turn rows into examples of at most `config.max_tokens` tokens.

    Args:
        rows: what was read.
        config: the recipe's data section, of format classes or tags.
        tokenizer: the base model's.
        names: the classes, in the order of their numbers.
        reads_both_ways: whether the base model is an encoder.

    Raises:
        DataError: a row is longer than `max_tokens` and `truncate` is off, or cannot be encoded; see `read_texts` and
            `read_words`.
    """
    number = {name: place for place, name in enumerate(names)}
    if config.format is Format.TAGS:
        readings = read_words([row.words for row in rows], tokenizer, max_tokens=config.max_tokens)
    else:
        readings = read_texts(
            [row.learned for row in rows], tokenizer, reads_both_ways=reads_both_ways, max_tokens=config.max_tokens
        )
    examples = []
    for row, reading in zip(rows, readings, strict=True):
        if reading.is_cut and not config.truncate:
            raise DataError(
                f"row {row.number}: more tokens than data.max_tokens ({config.max_tokens}); raise it, or set "
                "data.truncate to true to cut longer rows"
            )
        labels = [NO_LOSS] * len(reading.ids)
        for place, label in zip(reading.places, row.labels, strict=True):
            if place is not None:
                labels[place] = number[label]
        words = tuple(word for word, place in zip(row.words, reading.places, strict=False) if place is not None)
        examples.append(Example("", row.learned, reading.ids, tuple(labels), words=words))
    kept = tuple(example for example in examples if example.loss_tokens)
    return BuiltExamples(kept, sum(reading.is_cut for reading in readings), len(examples) - len(kept))
