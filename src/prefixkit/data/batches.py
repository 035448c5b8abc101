"""Batches: padding on the right, and an order that puts texts of similar length together."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from prefixkit.data.examples import NO_LOSS, Example
from prefixkit.errors import ConfigError
from prefixkit.seeding import derive

_BATCHES_PER_POOL = 50
"""Texts are sorted within pools of this many batches: enough to pad little, few enough to mix well."""


def input_ends(labels: Int[Tensor, "b t"]) -> Int[Tensor, "b"]:
    """Return the column of each row's last token before the first that is scored: what predicts it."""
    scored = labels[:, 1:] != NO_LOSS
    return scored.int().argmax(dim=1)


class Collator:
    """Turns examples into the keyword arguments of a model's forward, padded on the right to the longest of them."""

    def __init__(self, pad_token_id: int | None):
        """Take the id to pad with; None (a tokenizer without one) pads with 0, which is masked as well."""
        self.pad_token_id = 0 if pad_token_id is None else pad_token_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` (1 for text, 0 for padding) and `labels` (-100 on padding), `[b, t]`.

        For an encoder-decoder the first two are its encoder's, `[b, s]`, and `decoder_input_ids` `[b, t]` go with the
        labels.
        """
        ids = [example.input_ids for example in examples]
        labels = _padded([example.labels for example in examples], NO_LOSS)
        sources = [example.source_ids for example in examples if example.source_ids is not None]
        read = sources or ids
        batch = {
            "input_ids": _padded(read, self.pad_token_id),
            "attention_mask": _padded([[1] * len(row) for row in read], 0),
            "labels": labels,
        }
        return batch | {"decoder_input_ids": _padded(ids, self.pad_token_id)} if sources else batch


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Int[Tensor, "b t"]:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def check_batch_size(batch_size: int, processes: int) -> None:
    """Refuse more processes than there are rows in a batch.

    Raises:
        ConfigError: there are.
    """
    if processes > batch_size:
        raise ConfigError(
            f"train.batch_size: {processes} processes cannot share batches of {batch_size}; raise it, or start "
            f"at most {batch_size} processes"
        )


class DistributedBatchSampler(Sampler[list[int]]):
    """Cuts an order of rows into batches, and gives one of several processes its share of each.

    All processes together read what one alone would have read; torch's own `DistributedSampler` and accelerate repeat
    rows where they do not come out even. Of a short last batch there may be nothing left for some: they read the row
    `IDLE`.
    """

    IDLE = -1

    def __init__(self, sampler: "LengthGroupedSampler", *, rank: int = 0, num_replicas: int = 1):
        """Describe the batches.

        Args:
            sampler: the order of the rows; its batch size is that of all processes together.
            rank: of the process whose share is wanted, counted from 0.
            num_replicas: how many processes there are.

        Raises:
            ConfigError: there are more processes than rows in a batch.
        """
        check_batch_size(sampler.batch_size, num_replicas)
        self.sampler, self.rank, self.num_replicas = sampler, rank, num_replicas

    def __len__(self) -> int:
        """Return the number of batches."""
        return math.ceil(len(self.sampler) / self.sampler.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0."""
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the row numbers of this share of every batch of one epoch."""
        rows = list(self.sampler)
        for start in range(0, len(rows), self.sampler.batch_size):
            batch = rows[start : start + self.sampler.batch_size]
            yield batch[self.rank :: self.num_replicas] or [self.IDLE]


class EpochDataLoader(DataLoader[Any]):
    """A data loader that hands the epoch on to its batch sampler, as transformers' Trainer expects."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0."""
        batches: Any = self.batch_sampler
        batches.set_epoch(epoch)


class LengthGroupedSampler(Sampler[int]):
    """A shuffled order of rows in which every `batch_size` in a row are of similar length.

    The order depends on the seed, the epoch, the lengths and the batch size alone: not on torch's global
    state, not on how often or how far it was iterated. A run that resumes sets the epoch and skips what it
    has seen. accelerate and transformers' Trainer call `set_epoch` by themselves.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        group_by_length: bool = True,
        longest_first: bool = False,
    ):
        """Describe the order.

        Args:
            lengths: tokens of every row.
            batch_size: rows per batch; the batches themselves are cut by the data loader.
            seed: the run's seed.
            group_by_length: false gives a plain shuffled order.
            longest_first: begin each epoch with the batch that holds the longest row, so that a run that will
                exhaust memory does so in its first step.

        Raises:
            ValueError: `batch_size` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.lengths = tuple(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.group_by_length = group_by_length
        self.longest_first = longest_first
        self.epoch = 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yield the row numbers of one epoch, each once."""
        generator = torch.Generator().manual_seed(derive(self.seed, f"data.order/{self.epoch}"))
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        if self.group_by_length:
            order = self._grouped(order, generator)
        yield from order

    def _grouped(self, order: list[int], generator: torch.Generator) -> list[int]:
        """Sort within pools, cut into batches, and shuffle the batches; a short batch comes last."""
        pool = self.batch_size * _BATCHES_PER_POOL
        batches = []
        for start in range(0, len(order), pool):
            by_length = sorted(order[start : start + pool], key=lambda row: -self.lengths[row])
            batches += [by_length[i : i + self.batch_size] for i in range(0, len(by_length), self.batch_size)]
        # The data loader cuts every batch_size rows: a short batch anywhere but last would shift all after
        # it.
        short = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        if self.longest_first and shuffled:
            longest = max(range(len(shuffled)), key=lambda i: self.lengths[shuffled[i][0]])
            shuffled.insert(0, shuffled.pop(longest))
        return [row for batch in [*shuffled, *short] for row in batch]
