"""A model is changed as a whole or not at all, and what would read the wrong prefix is refused."""

import copy
import io

import pytest
import torch
from transformers import StaticCache

from conformance.encoder_families import ENCODER_DECODERS, build, source_of
from prefixkit.errors import InjectionError
from prefixkit.injection import attach
from prefixkit.models.inspect import inspect_model


@pytest.fixture
def t5(make_prefix, make_ids):
    model = build(ENCODER_DECODERS["t5"])
    return model, make_prefix(model, 3), source_of(model, 1) | {"decoder_input_ids": make_ids(1, 3)}


@pytest.mark.parametrize("stack", ["get_encoder", "get_decoder"])
def test_changing_the_attention_of_one_stack_under_a_prefix_is_refused(stack, t5):
    """transformers' T5 keeps a configuration per stack."""
    model, prefix, inputs = t5
    with attach(model, prefix):
        getattr(model, stack)().set_attn_implementation("eager")
        with pytest.raises(InjectionError, match="attention implementation was changed while a prefix was attached"):
            model(**inputs)


def test_stacks_with_attentions_of_their_own_get_them_back(t5):
    model, prefix, inputs = t5
    with attach(model, prefix):
        expected = model(**inputs).logits
    model.get_decoder().set_attn_implementation("eager")
    parts = [model, model.get_encoder(), model.get_decoder()]
    before = [part.config._attn_implementation for part in parts]
    assert before == ["sdpa", "sdpa", "eager"]
    with attach(model, prefix):
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-10)
    assert [part.config._attn_implementation for part in parts] == before


@pytest.mark.parametrize("is_inspected", [True, False])
def test_a_model_that_shares_its_configuration_with_one_in_use_is_refused_and_left_alone(
    is_inspected, make_model, make_prefix, make_ids
):
    model, ids = make_model("llama", fresh=True), make_ids(1, 5)
    other = type(model)(model.config).double().eval().requires_grad_(False)
    plain, prefix = other(input_ids=ids).logits, make_prefix(model, 3)
    if is_inspected:
        attach(other, make_prefix(other, 3)).detach()
    with attach(model, prefix):
        with pytest.raises(InjectionError, match="shares its configuration with one to which a prefix is attached"):
            attach(other, prefix)
        with pytest.raises(InjectionError, match="or is that model's own; give each model a configuration of its own"):
            other(input_ids=ids)
    assert torch.equal(other(input_ids=ids).logits, plain)
    attach(other, make_prefix(other, 3)).detach()


def test_an_attach_that_fails_half_way_is_undone(make_model, make_prefix, make_ids, monkeypatch):
    model, ids = make_model("llama", fresh=True), make_ids(1, 5)
    plain, prefix = model(input_ids=ids).logits, make_prefix(model, 3)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]

    def fail(*_, **__):
        raise MemoryError("no room for a hook")

    with monkeypatch.context() as patched:
        patched.setattr(model.model, "register_forward_hook", fail)
        with pytest.raises(MemoryError, match="no room for a hook"):
            attach(model, prefix)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert torch.equal(model(input_ids=ids).logits, plain)
    attach(model, prefix).detach()


def test_a_layer_on_its_own_is_refused_after_a_pass_as_before_it(make_model, make_prefix, make_ids):
    model, ids = make_model("llama"), make_ids(2, 7)
    hidden = torch.randn(2, 7, model.config.hidden_size, dtype=torch.float64)
    turned = model.model.rotary_emb(hidden, torch.arange(7)[None])
    mask = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    with attach(model, make_prefix(model, 3)):
        for _ in range(2):
            with pytest.raises(InjectionError, match="an attention layer was called on its own"):
                model.model.layers[0](hidden, attention_mask=mask, position_embeddings=turned)
            model(input_ids=ids)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: torch.save(model, io.BytesIO())])
def test_a_model_with_a_prefix_is_not_copied(copied, make_model, make_prefix, make_ids):
    model, ids = make_model("llama"), make_ids(1, 5)
    with attach(model, make_prefix(model, 3)):
        expected = model(input_ids=ids).logits
        with pytest.raises(InjectionError, match="prefix attached cannot be copied or pickled; detach it first"):
            copied(model)
        assert torch.equal(model(input_ids=ids).logits, expected)
    copied(model)


def test_a_mask_with_columns_for_the_prefix_is_refused(make_model, make_prefix, make_ids):
    """transformers would cut it at its end, so that the text's padding moved."""
    model, ids, mask = make_model("llama"), make_ids(2, 7), torch.ones(2, 10, dtype=torch.long)
    with attach(model, make_prefix(model, 3)):
        with pytest.raises(InjectionError, match="attention_mask has 10 columns for 7 tokens; give one per token of"):
            model(input_ids=ids, attention_mask=mask)
        cache = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
        model(input_ids=ids[:, 4:], attention_mask=mask[:, :7], past_key_values=cache)


def test_generating_from_nothing_is_one_row(make_model, make_prefix):
    model = make_model("llama")
    prefix, other = make_prefix(model, 3), make_prefix(model, 2, seed=5)
    options = {"num_return_sequences": 2, "do_sample": True, "max_new_tokens": 3, "pad_token_id": 0}
    with (
        attach(model, [prefix, other]),
        pytest.raises(InjectionError, match="for 2 rows are .*, the batch has 1"),
    ):
        model.generate(**options)
    with attach(model, [prefix]):
        assert len(model.generate(**options)) == 2


def test_encoder_outputs_say_how_many_rows_there_are(make_prefix, make_ids):
    model = build(ENCODER_DECODERS["t5"])
    rows, source = [make_prefix(model, 3), make_prefix(model, 2, seed=5)], source_of(model, 2)
    options = {"max_new_tokens": 4, "do_sample": False}
    with attach(model, rows):
        expected = model.generate(**source, **options)
        outputs = model.get_encoder()(**source)
        found = model.generate(encoder_outputs=outputs, **options)
    assert torch.equal(found, expected)


def test_a_mask_as_wide_as_a_static_cache_is_taken(make_model, make_prefix, make_ids):
    model, ids, mask = make_model("llama"), make_ids(2, 7), torch.zeros(2, 16, dtype=torch.long)
    mask[:, :7] = 1
    with attach(model, make_prefix(model, 3)):
        expected = model(input_ids=ids).logits
        cache = StaticCache(config=model.config, max_cache_len=16)
        found = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_inspecting_leaves_the_attention_of_each_stack_alone():
    model = build(ENCODER_DECODERS["t5"])
    model.get_decoder().set_attn_implementation("eager")
    inspect_model(model)
    assert [part.config._attn_implementation for part in (model, model.get_decoder())] == ["sdpa", "eager"]
