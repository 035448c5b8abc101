"""Padding that nothing sees, and an order that depends on seed and epoch alone."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from prefixkit.data import NO_LOSS, Collator, Example, LengthGroupedSampler

LENGTHS = [(7 * i) % 90 + 2 for i in range(1003)]


def example(*ids: int) -> Example:
    return Example("", "", ids, (NO_LOSS, *ids[1:]))


def batches(order: Sequence[int], size: int) -> list[Sequence[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


def padding(order: Sequence[int], size: int) -> int:
    found = batches(order, size)
    return sum(max(LENGTHS[i] for i in batch) - LENGTHS[i] for batch in found for i in batch)


def test_batch_is_padded_on_the_right_without_loss_or_attention() -> None:
    batch = Collator(9)([example(5, 6, 7), example(8, 4)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 4, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[NO_LOSS, 6, 7], [NO_LOSS, 4, NO_LOSS]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_text_token_that_equals_the_padding_keeps_its_loss() -> None:
    # SmolLM2 pads with its EOS: masking by id instead of by length would forget how to stop.
    batch = Collator(9)([example(5, 9), example(5, 6, 9)])
    assert batch["labels"].tolist() == [[NO_LOSS, 9, NO_LOSS], [NO_LOSS, 6, 9]]


def test_tokenizer_without_padding_token_pads_with_zero() -> None:
    assert Collator(None)([example(5, 6), example(5)])["input_ids"].tolist() == [[5, 6], [5, 0]]


@given(
    lengths=st.lists(st.integers(1, 50), max_size=200),
    size=st.integers(1, 9),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
    grouped=st.booleans(),
    longest=st.booleans(),
)
def test_every_row_comes_once_and_the_order_repeats(
    lengths: list[int], size: int, seed: int, epoch: int, grouped: bool, longest: bool
) -> None:
    def order() -> list[int]:
        sampler = LengthGroupedSampler(lengths, size, seed=seed, group_by_length=grouped, longest_first=longest)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order()) == list(range(len(lengths)))
    assert order() == order()


@pytest.mark.parametrize("grouped", [True, False])
def test_order_changes_with_seed_and_epoch_and_nothing_else(grouped: bool) -> None:
    sampler = LengthGroupedSampler(LENGTHS, 8, seed=0, group_by_length=grouped)
    first = list(sampler)
    torch.rand(3)
    assert list(sampler) == first, "iterating again must not move on by itself"
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(LengthGroupedSampler(LENGTHS, 8, seed=1, group_by_length=grouped)) != first


def test_sampling_leaves_torchs_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    list(LengthGroupedSampler(LENGTHS, 8, seed=0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_grouping_pads_a_tenth_of_a_plain_shuffle() -> None:
    grouped = list(LengthGroupedSampler(LENGTHS, 8, seed=0))
    plain = list(LengthGroupedSampler(LENGTHS, 8, seed=0, group_by_length=False))
    assert padding(grouped, 8) < 0.1 * padding(plain, 8)


def test_batches_do_not_come_sorted_by_length() -> None:
    order = list(LengthGroupedSampler(LENGTHS, 8, seed=0))
    means = [sum(LENGTHS[i] for i in batch) / len(batch) for batch in batches(order, 8)]
    rising = sum(late > early for early, late in pairwise(means))
    assert 0.35 < rising / (len(means) - 1) < 0.75


def test_longest_row_is_in_the_first_batch_if_asked() -> None:
    lengths = [*LENGTHS[:800], 500]
    order = list(LengthGroupedSampler(lengths + [1] * 7, 8, seed=0, longest_first=True))
    assert 800 in order[:8]


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        LengthGroupedSampler(LENGTHS, 0, seed=0)


@pytest.mark.parametrize("grouped", [True, False])
def test_resuming_through_accelerate_continues_the_same_order(grouped: bool) -> None:
    def loader() -> Any:
        sampler = LengthGroupedSampler(LENGTHS[:100], 8, seed=3, group_by_length=grouped)
        return Accelerator(cpu=True).prepare(DataLoader(list(range(100)), batch_size=8, sampler=sampler))

    def epoch(source: Any, number: int) -> list[list[int]]:
        source.set_epoch(number)
        return [batch.tolist() for batch in source]

    whole = loader()
    epochs = [epoch(whole, number) for number in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    # What transformers' Trainer does after a kill in epoch 1, five batches in.
    fresh = loader()
    assert epoch(skip_first_batches(fresh, 5), 1) == epochs[1][5:]
    assert epoch(fresh, 2) == epochs[2]
