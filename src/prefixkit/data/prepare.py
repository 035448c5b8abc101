"""From a recipe's data section to everything a run reads: read, clean, deduplicate, split, filter, encode."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from prefixkit.config import DataConfig
from prefixkit.data.clean import clean_row
from prefixkit.data.examples import BuiltExamples, Example, build_examples
from prefixkit.data.filters import Filtered, filter_rows
from prefixkit.data.labelled import build_labelled, class_names
from prefixkit.data.rows import LabelledText, Row
from prefixkit.data.sources import kept_label, load_rows
from prefixkit.data.splits import Split, content_hash, distinct_rows, split_rows
from prefixkit.data.stream import TrainingStream
from prefixkit.data.training_rows import choose_rows
from prefixkit.errors import DataError
from prefixkit.logs import get_logger
from prefixkit.models.specials import Ids

log = get_logger(__name__)

_NOT_HASHED = {"source", "subset", "hub_split", "max_rows"}
"""Settings that say where the rows are, not what they are: the same file elsewhere is the same data."""
_OF_STREAMS = {"stream", "stream_head", "stream_window"}
"""Settings that change nothing where rows are not streamed."""

#: Inputs so few that no number of rows makes them fall into every split.
_FEW_INPUTS = 5


@dataclass(frozen=True)
class DataCounts:
    """What became of the rows, for `run.json`. The filters are counted in the order they stand here."""

    read: int
    """Rows of the source."""
    duplicates: int
    """Later copies of a text."""
    contradictory: int
    """Rows whose text comes with several labels, all copies."""
    other_label: int
    """Rows of other labels than the one learned."""
    too_short: int
    """Rows of that label with fewer words than `min_words`."""
    too_long: int
    """Rows of that label with more words than `max_words`."""
    unclear: int
    """Training rows left out by `clearest`."""
    unlikely: int
    """Training examples left out by `likeliest`."""
    without_loss: int
    """Rows of train, validation and test of which nothing learned remained within `max_tokens`."""
    truncated: int
    """Examples of train, validation and test that were cut at `max_tokens`."""
    train: int
    """Examples to train on."""
    validation: int
    """Examples for early stopping."""
    test: int
    """Examples to report on."""
    contrast: int
    """Test examples of other labels."""
    judge: int
    """Rows the judge learns from."""
    judge_test: int
    """Rows the judge is measured on."""


@dataclass(frozen=True)
class PreparedData:
    """Everything a run reads. No row, and no input, occurs in two of train, validation, test and judge.

    What is learned may: rows of different inputs can have the same target. Of those the judge learns from none that is
    also learned or reported.

    Attributes:
        train: examples of the kept label, in the order of the source.
        validation: likewise, for early stopping.
        test: likewise, for the reported numbers.
        contrast: rows of the test split with other labels, through the same filters; empty without
            `keep_label`.
        judge_rows: rows of the judge split, every label and length; empty without `label_column`.
        judge_test_rows: rows of the test split, every label, through the length filters, to measure the judge
            on texts like those it will judge.
        kept_label: name of the label learned, as the judge's rows spell it; None where all rows are.
        classes: names of the labels to tell apart, in the order of their numbers; empty where text is learned.
        hash: SHA-256 of what training sees, in its order, and of the settings that shaped it; of a stream, of what its
            first rows gave; with `data.likeliest`, of what that chooses from.
        counts: what became of the rows.
        stream: with `data.stream`, where training rows come from; all else is of the source's first rows, `train` too.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    contrast: tuple[Example, ...]
    judge_rows: tuple[LabelledText, ...]
    judge_test_rows: tuple[LabelledText, ...]
    kept_label: str | None
    classes: tuple[str, ...]
    hash: str
    counts: DataCounts
    stream: TrainingStream | None = None


def prepare(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefix_tokens: int,
    context_tokens: int | None,
    start: int | None = None,
    reads_both_ways: bool = False,
) -> PreparedData:
    """Read the rows a recipe names and make everything of them that a run reads.

    Args:
        config: the recipe's data section.
        tokenizer: the base model's.
        prefix_tokens: positions the prefix takes, in virtual tokens.
        context_tokens: positions the base model has; None where it has no limit.
        start: for an encoder-decoder, the token its decoder starts from.
        reads_both_ways: whether the base model is an encoder.

    Raises:
        DataError: the source is not usable (see `load_rows`), nothing is left after the filters or in a
            split, a row cannot be encoded (see `build_examples` and `build_labelled`), or prefix and text
            together exceed the context.
    """
    rows = load_rows(config)
    distinct = distinct_rows(map(clean_row, rows) if config.clean_html else rows)
    splits = split_rows(distinct.rows, config.shares)
    label = kept_label(config)
    filtered = filter_rows(distinct.rows, config, label)
    if not filtered.rows:
        raise DataError(_explain_empty(config, len(rows), distinct.contradictory, filtered))
    of_split = split_rows(filtered.rows, config.shares)
    _check_splits(of_split, len(filtered.rows), config)
    chosen = choose_rows(of_split[Split.TRAIN], [row for row in splits[Split.TRAIN] if row.label != label], config)
    of_split[Split.TRAIN] = chosen.rows

    classes = class_names(filtered.rows) if config.format.is_classified else ()

    def build(rows: Sequence[Row]) -> BuiltExamples:
        if classes:
            return build_labelled(rows, config, tokenizer, classes, reads_both_ways=reads_both_ways)
        return build_examples(rows, config, tokenizer, start=start)

    built = {split: build(of_split[split]) for split in (Split.TRAIN, Split.VALIDATION, Split.TEST)}
    _check_loss(built, config)
    same_length = filter_rows(splits[Split.TEST], config, None).rows
    others = [row for row in same_length if label is not None and row.label != label]
    contrast = build(others).examples
    learned = [example for result in built.values() for example in result.examples]
    fits = partial(check_context, prefix_tokens=prefix_tokens, context_tokens=context_tokens)
    fits([*learned, *contrast])

    judge_test = _labelled(same_length)
    elsewhere = {content_hash(row.learned) for split in splits if split is not Split.JUDGE for row in splits[split]}
    judge = _labelled(row for row in splits[Split.JUDGE] if content_hash(row.learned) not in elsewhere)
    train, validation, test = (built[split].examples for split in (Split.TRAIN, Split.VALIDATION, Split.TEST))
    counts = DataCounts(
        read=len(rows),
        duplicates=distinct.duplicates,
        contradictory=distinct.contradictory,
        other_label=filtered.other_label,
        too_short=filtered.too_short,
        too_long=filtered.too_long,
        unclear=chosen.unclear,
        unlikely=0,
        without_loss=sum(result.without_loss for result in built.values()),
        truncated=sum(result.truncated for result in built.values()),
        train=len(train),
        validation=len(validation),
        test=len(test),
        contrast=len(contrast),
        judge=len(judge),
        judge_test=len(judge_test),
    )
    _log(counts, config)
    return PreparedData(
        train,
        validation,
        test,
        contrast,
        judge,
        judge_test,
        label,
        classes,
        _hash(config, train, validation, classes),
        counts,
        TrainingStream(config, build, fits) if config.stream else None,
    )


def keep_examples(data: PreparedData, places: Sequence[int]) -> PreparedData:
    """Return the data with some of the training examples alone.

    Args:
        data: all of it.
        places: of the examples to keep, in rising order.
    """
    train = tuple(data.train[place] for place in places)
    counts = replace(data.counts, train=len(train), unlikely=len(data.train) - len(train))
    return replace(data, train=train, counts=counts)


def longest_first(data: PreparedData, max_tokens: int) -> tuple[Example, ...]:
    """Return training examples with one as long as any can be: of a stream, longer ones may follow."""
    if data.stream is None:
        return data.train
    longest = max(data.train, key=lambda example: example.num_tokens)

    def stretched(ids: Ids) -> Ids:
        return (ids * -(-max_tokens // len(ids)))[:max_tokens]

    source = None if longest.source_ids is None else stretched(longest.source_ids)
    ids, labels = stretched(longest.input_ids), stretched(longest.labels)
    return (replace(longest, input_ids=ids, labels=labels, source_ids=source), *data.train)


def check_context(examples: Iterable[Example], *, prefix_tokens: int, context_tokens: int | None) -> None:
    """Raise if the longest example does not fit the model's context together with the prefix.

    Raises:
        DataError: it does not.
    """
    longest = max((example.longest for example in examples), default=0)
    if context_tokens is not None and prefix_tokens + longest > context_tokens:
        raise DataError(
            f"prefix {prefix_tokens} + text {longest} tokens exceed the model's context of {context_tokens}; "
            "lower data.max_tokens or prefix.num_virtual_tokens"
        )


def _explain_empty(config: DataConfig, read: int, contradictory: int, filtered: Filtered) -> str:
    reasons = (
        (contradictory, "have the text of a row with another label"),
        (filtered.other_label, f"have another label than {kept_label(config)} (data.keep_label)"),
        (filtered.too_short, f"have fewer than {config.min_words} words (data.min_words)"),
        (filtered.too_long, f"have more than {config.max_words} words (data.max_words)"),
    )
    listed = ", ".join(f"{count} {reason}" for count, reason in reasons if count)
    return f"{config.source}: none of {read} rows left to learn from: {listed}; widen the filters"


def _check_splits(splits: dict[Split, tuple[Row, ...]], total: int, config: DataConfig) -> None:
    for split in (Split.TRAIN, Split.VALIDATION, Split.TEST):
        if not splits[split]:
            keys = len({row.split_key for rows in splits.values() for row in rows})
            if keys < min(total, _FEW_INPUTS):
                raise DataError(
                    f"data.split.{split}: no row fell into it: all {total} rows have {keys} inputs between them, and "
                    "rows of one input stay together; an input that is always the same belongs into data.prompt, with "
                    "data.format=text"
                )
            raise DataError(
                f"data.split.{split}: none of the {total} rows left after the filters fell into it; "
                + ("raise data.stream_head" if config.stream else "give more rows or a larger share")
            )


def _check_loss(built: dict[Split, BuiltExamples], config: DataConfig) -> None:
    for split, result in built.items():
        if not result.examples and config.format.is_classified:
            raise DataError(
                f"data.text_column: the tokenizer of this base model reads no word of the {split} split; "
                "choose another base model"
            )
        if not result.examples:
            raise DataError(
                f"data.max_tokens: what stands before the learned text fills all {config.max_tokens} tokens "
                f"in every row of the {split} split ({result.without_loss}); raise data.max_tokens "
                "or shorten data.prompt"
            )


def _labelled(rows: Iterable[Row]) -> tuple[LabelledText, ...]:
    return tuple(LabelledText(row.learned, row.label) for row in rows if row.label is not None and row.learned.strip())


def _hash(config: DataConfig, train: Sequence[Example], validation: Sequence[Example], classes: Sequence[str]) -> str:
    left_out = _NOT_HASHED if config.stream else _NOT_HASHED | _OF_STREAMS
    left_out = left_out | {"likeliest"} if config.likeliest == 1 else left_out
    left_out = left_out | {"train_rows", "subset_seed"} if config.train_rows is None else left_out
    left_out = left_out if config.learn_also else left_out | {"learn_also"}
    digest = hashlib.sha256(config.model_dump_json(exclude=left_out).encode())
    if classes:
        digest.update(json.dumps(classes).encode())
    for name, examples in (("train", train), ("validation", validation)):
        digest.update(f"\n{name} {len(examples)}\n".encode())
        for example in examples:
            seen = [example.prompt, example.text, example.input_ids, example.labels]
            seen += [] if example.source_ids is None else [example.source_ids]
            digest.update(json.dumps(seen).encode())
    return digest.hexdigest()


def _log(counts: DataCounts, config: DataConfig) -> None:
    if config.stream:
        log.info("of the first %d records, as others are read while training (data.stream):", config.stream_head)
    log.info(
        "rows: %d read, %d duplicates and %d contradictory left out, %d of another label, %d too short, %d too long",
        counts.read,
        counts.duplicates,
        counts.contradictory,
        counts.other_label,
        counts.too_short,
        counts.too_long,
    )
    log.info(
        "examples: %d train, %d validation, %d test, %d contrast; %d rows for the judge; %d cut at %d tokens",
        counts.train,
        counts.validation,
        counts.test,
        counts.contrast,
        counts.judge,
        counts.truncated,
        config.max_tokens,
    )
    if counts.unclear:
        log.info(
            "%d training rows left out that do not open clearly as %s (data.clearest)",
            counts.unclear,
            config.keep_label,
        )
    if counts.without_loss:
        log.warning(
            "%d rows left out: within %d tokens nothing learned remained of them (data.max_tokens)",
            counts.without_loss,
            config.max_tokens,
        )
