"""What cannot take a prefix is refused, with the reason, and left untouched."""

import gc
import weakref

import pytest
import torch

from conformance.families import build
from conformance.refusals import REFUSED
from prefixkit.errors import InjectionError, UnsupportedModelError
from prefixkit.injection import attach
from prefixkit.models.fingerprint import weights_hash
from prefixkit.models.inspect import inspect_model
from prefixkit.models.text_states import text_states
from prefixkit.prefix import BaseCard, Prefix


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_that_cannot_take_a_prefix_is_refused_untouched(model_type):
    refusal = REFUSED[model_type]
    if refusal.is_over:
        check_taken(build(model_type, refusal.settings))
        return
    model = build(model_type, refusal.settings).float().train()
    implementation, weights = model.config._attn_implementation, weights_hash(model)
    with pytest.raises(UnsupportedModelError, match=refusal.reason) as caught:
        attach(model, None)
    assert str(caught.value).startswith(type(model).__name__)
    assert "\n" not in str(caught.value)
    assert model.config._attn_implementation == implementation
    assert weights_hash(model) == weights
    assert all(module.training for module in model.modules())


def check_taken(model):
    """A family that came onto the interface later takes a prefix exactly: the states of a text equal the text."""
    model = model.requires_grad_(False)
    text, ids = torch.tensor([5, 9, 6, 8]), torch.tensor([[7, 11, 4], [3, 5, 12]])
    expected = model(input_ids=torch.cat([text.expand(2, -1), ids], dim=1)).logits[:, 4:]
    prefix = Prefix.from_states(text_states(model, text), base=BaseCard(id="tiny"))
    with attach(model, prefix):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("later", ["flex_attention", "eager with upcast"])
def test_an_implementation_set_after_the_first_look_is_refused_too(later, make_model):
    model = make_model("gpt2", fresh=True)
    inspect_model(model)
    if later == "flex_attention":
        model.config._attn_implementation_internal = later
    else:
        model.set_attn_implementation("eager")
        model.config.reorder_and_upcast_attn = True
    with pytest.raises(UnsupportedModelError, match="is not supported; load the model with|bypasses the attention"):
        attach(model, None)


def test_an_eager_model_of_a_family_without_eager_attention_is_refused_untouched(make_model, make_prefix, monkeypatch):
    model = make_model("llama", "eager", fresh=True)
    prefix = make_prefix(model, 3)
    monkeypatch.delattr("transformers.models.llama.modeling_llama.eager_attention_forward")
    with pytest.raises(UnsupportedModelError, match="LlamaAttention: its family defines no eager attention; use sdpa"):
        attach(model, prefix)
    assert model.config._attn_implementation == "eager"
    assert not any(hasattr(module, "_prefixkit_slot") for module in model.modules())


def test_looking_keeps_every_modules_own_mode_and_no_model_alive(make_model):
    model = make_model("llama", fresh=True)
    model.model.layers[0].train()
    modes = [module.training for module in model.modules()]
    inspect_model(model)
    text_states(model, torch.tensor([5, 6]))
    assert [module.training for module in model.modules()] == modes
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_text_states_refuse_a_model_with_a_prefix(make_model, make_prefix):
    model = make_model("llama")
    with (
        attach(model, make_prefix(model, 3)),
        pytest.raises(InjectionError, match="detach it before reading the states"),
    ):
        text_states(model, torch.tensor([5, 6]))
