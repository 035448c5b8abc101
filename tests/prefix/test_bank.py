"""The bank: distinct prefixes are stored once, however many rows read them and however these are moved."""

import pytest
import torch

from prefixkit.injection.attached import from_prefixes
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import BaseCard, Prefix, stack


@pytest.fixture
def anatomy(make_model):
    return inspect_model(make_model("llama"))


@pytest.fixture
def prefixes(make_model, make_states):
    model = make_model("llama")
    return [Prefix.from_states(make_states(model, n, seed=n), base=BaseCard(id="tiny")) for n in (2, 5)]


def numbers(bank):
    return sum(site.key.numel() + site.value.numel() for site in bank.entries)


def test_rows_of_one_prefix_store_it_once(make_model, anatomy, prefixes):
    short, long = prefixes
    mixed = [short, None, long, short, long, None, short]
    bank = from_prefixes(make_model("llama"), anatomy, mixed).bank
    assert len(bank) == 7
    assert numbers(bank) == numbers(stack([short.states, None, long.states], [0, 0, 0]))
    states = [None if each is None else each.states for each in mixed]
    offsets = [0 if each is None else each.position_offset for each in mixed]
    plain = stack(states, offsets, bank.beside)
    assert bank.offsets.tolist() == plain.offsets.tolist()
    for number in range(len(bank.entries)):
        one, two = bank.site(number), plain.site(number)
        torch.testing.assert_close((one.key, one.value), (two.key, two.value), rtol=0, atol=0)
        assert torch.equal(one.mask, two.mask)
    assert bank.equals(plain)


def test_moved_rows_copy_nothing(make_model, anatomy, prefixes):
    short, long = prefixes
    bank = from_prefixes(make_model("llama"), anatomy, [short, long]).bank
    moved = bank.rows(torch.tensor([1, 1, 0])).rows(torch.tensor([2, 0, 0, 1]))
    assert moved.entries is bank.entries
    assert moved.offsets.tolist() == [2, 5, 5, 5]
    assert moved.site(0).key.shape[0] == 4
    assert torch.equal(moved.site(0).key[0, :, :2], short.states.sites[0].key)
    assert torch.equal(moved.site(0).value[3], long.states.sites[0].value)


def test_one_prefix_for_several_rows_is_shared_not_copied(make_model, anatomy, prefixes):
    bank = from_prefixes(make_model("llama"), anatomy, [prefixes[0]] * 3).bank
    assert len(bank) == 3
    assert bank.site(1).key.shape[0] == 3
    assert bank.site(1).key.untyped_storage().data_ptr() == bank.entries[1].key.untyped_storage().data_ptr()
