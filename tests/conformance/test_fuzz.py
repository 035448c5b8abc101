"""Fuzzing: any family, any lengths, any rows, any padding, any split into cached steps, against the loops."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conformance import reference
from conformance.families import FAMILIES, VOCABULARY, build_model
from conformance.precision import KeepFloat64
from conformance.scene import offsets_of, states_of
from prefixkit.injection import attach
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import BaseCard, Prefix, PrefixStates, SiteStates

MODELS = {}
KINDS = [(name, attention) for name, family in FAMILIES.items() for attention in family.attentions]


def model_of(name, attention):
    """Built once per family and implementation."""
    if (name, attention) not in MODELS:
        MODELS[name, attention] = build_model(name, attention)
    return MODELS[name, attention]


@st.composite
def prefixes(draw):
    """What a row reads: nothing, or lengths per layer (0 leaves a layer out), a gate, an offset and a seed."""
    if draw(st.booleans()):
        return None
    lengths = draw(st.lists(st.integers(0, 5), min_size=3, max_size=3))
    return lengths, draw(st.booleans()), draw(st.integers(0, 7)), draw(st.integers(0, 99))


@st.composite
def batches(draw):
    """A batch: rows with their prefixes and padding, the side it is on, and where a cached pass is cut."""
    tokens = draw(st.integers(1, 8))
    rows = draw(st.lists(st.tuples(prefixes(), st.integers(0, tokens - 1)), min_size=1, max_size=4))
    side = draw(st.sampled_from(["left", "right", "no mask"]))
    cut = draw(st.integers(0, tokens - 1))
    return draw(st.sampled_from(KINDS)), tokens, rows, side, cut, draw(st.integers(0, 999))


def make(model, chosen):
    """A random prefix as chosen."""
    if chosen is None:
        return None
    lengths, gated, offset, seed = chosen
    dice = torch.Generator().manual_seed(seed)
    geometry = inspect_model(model).geometry

    def numbers(*shape):
        return torch.randn(*shape, generator=dice, dtype=torch.float64)

    sites = tuple(
        SiteStates(numbers(s.kv_heads, p, s.head_dim), numbers(s.kv_heads, p, s.head_dim),
                   numbers(s.query_heads) if gated else None)
        for s, p in zip(geometry.sites, lengths, strict=True)
    )  # fmt: skip
    return Prefix.from_states(PrefixStates(geometry, sites), base=BaseCard(id="tiny"), position_offset=offset)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(batches())
def test_any_batch_equals_the_loops(batch):
    (name, attention), tokens, chosen, side, cut, seed = batch
    model, family = model_of(name, attention), FAMILIES[name]
    rows = [make(model, each) for each, _ in chosen]
    ids = torch.randint(3, VOCABULARY, (len(rows), tokens), generator=torch.Generator().manual_seed(seed))
    mask = None if side == "no mask" else torch.ones_like(ids)
    for row, (_, padded) in enumerate(chosen):
        if padded and mask is not None:
            mask[row, slice(None, padded) if side == "left" else slice(tokens - padded, None)] = 0
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    with KeepFloat64(), torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        expected = reference.logits(model, family, states_of(rows), offsets_of(rows), embeds, mask)
        with attach(model, rows):
            if cut:
                head = model(input_ids=ids[:, :cut], attention_mask=None if mask is None else mask[:, :cut])
                tail = model(input_ids=ids[:, cut:], attention_mask=mask, past_key_values=head.past_key_values)
                found = torch.cat([head.logits, tail.logits], dim=1)
            else:
                found = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-10, atol=1e-10)
