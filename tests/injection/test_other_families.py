"""Families beyond the registry: whatever happens, the result is exact, or the model is refused untouched."""

import gc
import weakref

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from prefixkit.errors import InjectionError, UnsupportedModelError
from prefixkit.injection import attach
from prefixkit.models.fingerprint import weights_hash
from prefixkit.models.inspect import inspect_model
from prefixkit.models.text_states import text_states
from prefixkit.prefix import BaseCard, Prefix

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0,
       "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
NOT_ATTENTION = "of its 2 layers are attention layers that can take a prefix"
NO_INTERFACE = "its attention does not go through transformers' attention interface"

EXACT = {
    "gpt_bigcode": GPT | {"multi_query": True},
    "phi": SIZES,
    "starcoder2": SIZES,
    "stablelm": SIZES,
    "cohere": SIZES,
    "olmo2": SIZES,
    "glm": SIZES | {"head_dim": 8},
    "granite": SIZES,
    "mixtral": SIZES | EXPERTS,
    "qwen3_moe": SIZES | EXPERTS | {"head_dim": 8},
    "smollm3": SIZES,
    "helium": SIZES | {"head_dim": 8},
}
REFUSED = {
    "falcon": ({"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}, NO_INTERFACE),
    "gptj": (GPT | {"rotary_dim": 4}, NO_INTERFACE),
    "mpt": ({"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4}, NO_INTERFACE),
    "qwen3_next": (SIZES | EXPERTS | {
        "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 16}, f"only 1 {NOT_ATTENTION}"),
    "mamba2": ({"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8,
                "state_size": 8, "n_groups": 1}, "takes no position_ids"),
    "deepseek_v3": (SIZES | {
        "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 6, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2},
        "keys and values of different shape are not supported"),
}  # fmt: skip


def build(model_type, settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings)).double().eval()
    if model_type in EXACT and "num_experts" in settings:
        model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    return model


@pytest.mark.parametrize("model_type", EXACT)
def test_the_states_of_a_text_equal_the_text_as_prompt(model_type, make_ids):
    model = build(model_type, EXACT[model_type]).requires_grad_(False)
    text, ids = make_ids(4, seed=4), make_ids(2, 5)
    expected = model(input_ids=torch.cat([text.expand(2, -1), ids], dim=1)).logits[:, 4:]
    prefix = Prefix.from_states(text_states(model, text), base=BaseCard(id="tiny"))
    with attach(model, [prefix, None]):
        mixed = model(input_ids=ids).logits
    plain = model(input_ids=ids).logits
    torch.testing.assert_close(mixed, torch.stack([expected[0], plain[1]]), rtol=1e-10, atol=1e-10)
    assert float((expected - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_that_cannot_take_a_prefix_is_refused_untouched(model_type):
    settings, reason = REFUSED[model_type]
    model = build(model_type, settings).float().train()
    implementation, weights = model.config._attn_implementation, weights_hash(model)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        attach(model, None)
    assert str(caught.value).startswith(type(model).__name__)
    assert "\n" not in str(caught.value)
    assert model.config._attn_implementation == implementation
    assert weights_hash(model) == weights
    assert all(module.training for module in model.modules())


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
