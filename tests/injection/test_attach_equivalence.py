"""Injection equals what is known to be right: a filled cache, the text itself, the model without a prefix."""

from dataclasses import replace

import pytest
import torch

from conformance.scene import PADDINGS
from conformance.scene import padding as padding_mask
from prefixkit.injection import attach, attention
from prefixkit.models.text_states import text_states
from prefixkit.prefix import BaseCard, Prefix, PrefixEncoder, PrefixStates


def encoder_with(states):
    """An encoder at depth 0 whose parameters are these states."""
    encoder = PrefixEncoder(states.geometry, states.lengths, dtype=torch.float64)
    with torch.no_grad():
        for pair, site in zip(encoder.states, states.sites, strict=True):
            pair.copy_(torch.stack([site.key, site.value]))
    return encoder


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_injection_equals_a_filled_cache_with_gradients(
    global_family, attention, padding, make_model, make_states, make_ids, cache_logits
):
    model = make_model(global_family, attention)
    states, ids = make_states(model, 3, grad=True), make_ids(3, 6)
    mask = padding_mask(padding, 3, 6)
    seen = torch.ones(3, 6, dtype=torch.bool) if mask is None else mask.bool()
    weights = torch.randn(3, 6, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * seen[..., None]
    expected = cache_logits(model, states, ids, mask)
    tensors = [tensor for site in states.sites for tensor in (site.key, site.value)]
    expected_gradients = torch.autograd.grad((expected * weights).sum(), tensors)

    encoder = encoder_with(states)
    with attach(model, encoder):
        logits = model(input_ids=ids, attention_mask=mask).logits
        (logits * weights).sum().backward()

    torch.testing.assert_close(logits[seen], expected[seen], rtol=1e-10, atol=1e-10)
    gradients = [part for pair in encoder.states for part in pair.grad]
    torch.testing.assert_close(gradients, list(expected_gradients), rtol=1e-10, atol=1e-10)
    assert min(float(gradient.abs().max()) for gradient in gradients) > 1e-9


def text_prefix(model, tokens):
    return Prefix.from_states(text_states(model, tokens), base=BaseCard(id="tiny"))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.usefixtures("all_float64")
def test_states_of_a_text_equal_the_text_as_prompt(global_family, attention, make_model, make_ids):
    model = make_model(global_family, attention)
    text, ids = make_ids(5, seed=4), make_ids(2, 6)
    whole = torch.cat([text.expand(2, -1), ids], dim=1)
    expected = model(input_ids=whole).logits[:, 5:]
    generated = model.generate(whole, do_sample=False, max_new_tokens=6, attention_mask=torch.ones_like(whole))
    with attach(model, text_prefix(model, text)):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-10, atol=1e-10)
        continued = model.generate(ids, do_sample=False, max_new_tokens=6, attention_mask=torch.ones_like(ids))
    assert torch.equal(continued, generated[:, 5:])


@pytest.mark.usefixtures("all_float64")
def test_a_text_inside_the_window_equals_the_text_as_prompt(windowed_family, make_model, make_ids):
    model = make_model(windowed_family, "eager")
    text, ids = make_ids(2, seed=4), make_ids(2, 2)
    expected = model(input_ids=torch.cat([text.expand(2, -1), ids], dim=1)).logits[:, 2:]
    with attach(model, text_prefix(model, text)):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-10, atol=1e-10)


def test_the_prefix_stays_visible_past_the_sliding_window(windowed_family, make_model, make_prefix, make_ids):
    """In windowed layers alone, the last token of a long text still feels the prefix."""
    model = make_model(windowed_family, "eager")
    kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"] * 3
    last_window = max(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    lengths = [3 if i == last_window else 0 for i in range(3)]
    ids = make_ids(1, 30)
    plain = model(input_ids=ids).logits
    with attach(model, make_prefix(model, lengths, offset=0)):
        prefixed = model(input_ids=ids).logits
    assert float((plain - prefixed)[0, -1].abs().max()) > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.usefixtures("all_float64")
def test_packed_documents_each_see_the_prefix_and_not_each_other(attention, make_model, make_prefix, make_ids):
    model = make_model("llama", attention)
    prefix, first, second = make_prefix(model, 3), make_ids(1, 4, seed=5), make_ids(1, 5, seed=6)
    packed, positions = torch.cat([first, second], dim=1), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with attach(model, prefix):
        alone = torch.cat([model(input_ids=ids).logits for ids in (first, second)], dim=1)
        together = model(input_ids=packed, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.usefixtures("all_float64")
def test_a_mask_given_in_four_dimensions_is_extended(attention, make_model, make_prefix, make_ids):
    model, ids = make_model("llama", attention), make_ids(2, 5)
    allowed = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    given = allowed if attention == "sdpa" else torch.zeros(2, 1, 5, 5).double().masked_fill(~allowed, -1e300)
    with attach(model, make_prefix(model, 3)):
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids, attention_mask=given).logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_cached_steps_without_position_ids_equal_one_pass(family, masked, make_model, make_prefix, make_ids):
    model, ids = make_model(family), make_ids(2, 9)
    mask = torch.ones_like(ids) if masked else None
    cache, parts = None, []
    with attach(model, [make_prefix(model, 3, seed=1), make_prefix(model, [1, 4, 2], seed=2)]):
        expected = model(input_ids=ids, attention_mask=mask).logits
        for start, end in ((0, 4), (4, 5), (5, 8), (8, 9)):
            seen = None if mask is None else mask[:, :end]
            out = model(input_ids=ids[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    # eager attention (Gemma 2) runs its softmax in float32, over another number of columns in one pass
    exact = 1e-10 if model.config._attn_implementation == "sdpa" else 1e-5
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=exact, atol=exact)


def test_the_implementation_is_told_that_the_mask_says_it_all(make_model, make_prefix, make_ids, monkeypatch):
    """Today's sdpa ignores its causal flag where a mask is given; a release that does not must not change results."""
    model, told = make_model("llama"), []
    original = attention.sdpa_attention
    monkeypatch.setattr(attention, "sdpa_attention", lambda *a, **k: told.append(k["is_causal"]) or original(*a, **k))
    with attach(model, make_prefix(model, 3)):
        model(input_ids=make_ids(1, 4))
    assert told == [False] * 3


def test_attention_weights_cover_prefix_and_text(make_model, make_prefix, make_ids):
    model = make_model("llama", "eager")
    for gated in (False, True):
        with attach(model, make_prefix(model, 3, gated=gated)):
            weights = model(input_ids=make_ids(2, 5), output_attentions=True).attentions
        assert [tuple(layer.shape) for layer in weights] == [(2, 4, 5, 8)] * 3
        for layer in weights:
            assert float((layer.sum(-1) - 1).abs().max()) < 1e-6  # its softmax runs in float32


def test_a_closed_gates_weights_are_those_of_the_text_behind_columns_of_zeros(make_model, make_states, make_ids):
    model, ids = make_model("llama", "eager"), make_ids(2, 5)
    states = make_states(model, 3, gated=True)
    shut = PrefixStates(states.geometry, tuple(replace(site, gate=torch.zeros(4).double()) for site in states.sites))
    plain = model(input_ids=ids, output_attentions=True).attentions
    with attach(model, Prefix.from_states(shut, base=BaseCard(id="tiny"))):
        found = model(input_ids=ids, output_attentions=True).attentions
    for own, seen in zip(plain, found, strict=True):
        assert torch.equal(seen[..., :3], torch.zeros(2, 4, 5, 3).to(seen.dtype))
        torch.testing.assert_close(seen[..., 3:], own, rtol=0, atol=1e-10)


def test_a_prefix_of_another_dtype_is_read_in_the_models(make_model, make_states, make_ids):
    model, ids = make_model("llama", fresh=True).bfloat16(), make_ids(2, 5)
    states = make_states(model, 3, gated=True)
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        cast = states.map(lambda tensor, dtype=dtype: tensor.to(dtype))
        with attach(model, Prefix.from_states(cast, base=BaseCard(id="tiny"))):
            found.append(model(input_ids=ids).logits)
    assert found[0].dtype == torch.bfloat16
    assert torch.equal(*found)
