"""A handle lets its model read something else, or nothing, while its hooks stay in place."""

from functools import partial

import pytest
import torch
from transformers import DynamicCache

from prefixkit.errors import InjectionError
from prefixkit.injection import attach
from prefixkit.prefix import PrefixEncoder, reproduce

EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(params=["sdpa", "eager"])
def model(request, family, make_model):
    return make_model(family, request.param)


def test_each_is_read_as_if_it_had_been_attached_alone(model, make_prefix, make_states, make_ids):
    ids, states = make_ids(2, 7), make_states(model, 2, seed=4)
    encoder = PrefixEncoder(states.geometry, states.lengths, dtype=torch.float64)
    reproduce(encoder, states)
    turns = [make_prefix(model, 3), None, [None, make_prefix(model, [1, 0, 4], seed=2)], encoder, None]
    alone = []
    for each in turns:
        with attach(model, each):
            alone.append(model(input_ids=ids).logits)
    with attach(model, turns[0]) as handle:
        for each, expected in zip(turns, alone, strict=True):
            handle.switch(each)
            torch.testing.assert_close(model(input_ids=ids).logits, expected, **EXACT)
    assert torch.equal(model(input_ids=ids).logits, alone[-1])


def test_with_nothing_to_read_it_generates_as_the_bare_model(model, make_prefix, make_ids):
    ids = make_ids(2, 5)
    mask = torch.ones_like(ids)
    if model.config._attn_implementation == "sdpa":  # a bare eager model makes NaN of left padding in float64
        mask[0, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    with attach(model, make_prefix(model, 3)) as handle:
        handle.switch(None)
        assert torch.equal(model.generate(ids, **options), expected)


def test_recomputed_layers_read_what_they_read_before(make_model, make_states, make_prefix, make_ids):
    model, ids = make_model("llama", fresh=True), make_ids(2, 6)
    states = make_states(model, 3)
    encoder = PrefixEncoder(states.geometry, states.lengths, dtype=torch.float64)
    reproduce(encoder, states)
    with attach(model, encoder):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    expected = [pair.grad.clone() for pair in encoder.states]
    encoder.zero_grad()
    model._set_gradient_checkpointing(True, partial(torch.utils.checkpoint.checkpoint, use_reentrant=False))
    model.train()
    with attach(model, encoder) as handle:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        handle.switch(make_prefix(model, 2, seed=7))
        model(input_ids=ids, use_cache=False)
        handle.switch(None)
        loss.backward()
    torch.testing.assert_close([pair.grad for pair in encoder.states], expected, **EXACT)


def test_caches_belong_to_what_was_read(make_model, make_prefix, make_ids):
    model, ids = make_model("llama"), make_ids(1, 4)
    bare, own = DynamicCache(), DynamicCache()
    model(input_ids=ids, past_key_values=bare)
    with attach(model, make_prefix(model, 3)) as handle:
        model(input_ids=ids, past_key_values=own)
        handle.switch(None)
        model(input_ids=ids, past_key_values=bare)  # nothing was read, nothing is read
        with pytest.raises(InjectionError, match="were filled under another prefix than the one attached"):
            model(input_ids=ids, past_key_values=own)
        fresh = model(input_ids=ids, use_cache=True).past_key_values
    model(input_ids=ids, past_key_values=bare)
    model(input_ids=ids, past_key_values=fresh)


def test_what_cannot_be_attached_changes_nothing(make_model, make_prefix, make_ids):
    model, ids = make_model("llama"), make_ids(1, 4)
    with attach(model, make_prefix(model, 3)) as handle:
        expected = model(input_ids=ids).logits
        with pytest.raises(InjectionError, match="has another geometry than this model"):
            handle.switch(make_prefix(make_model("gpt2"), 3))
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_handle_without_hooks_switches_nothing(make_model, make_prefix):
    model = make_model("llama")
    handle = attach(model, make_prefix(model, 3))
    handle.detach()
    for each in (handle, attach(model, None)):
        with pytest.raises(InjectionError, match=r"nothing is attached by this handle; call attach\(\) again"):
            each.switch(make_prefix(model, 3))
