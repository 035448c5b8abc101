"""Every causal language model transformers has, as a tiny one: exact, or refused by name in one line."""

import re

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from conformance.families import EXPERTS, GPT, GROUPED
from conformance.precision import KeepFloat64
from prefixkit.errors import UnsupportedModelError
from prefixkit.injection import attach
from prefixkit.models.fingerprint import fingerprint
from prefixkit.models.inspect import inspect_model
from prefixkit.models.text_states import text_states
from prefixkit.prefix import BaseCard, Prefix

#: One set of sizes, under all the names families have for them.
SIZES = GROUPED | GPT | EXPERTS | {
    "head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "word_embed_proj_dim": 32, "ffn_dim": 48, "ffn_hidden_size": 48, "d_model": 32, "n_heads": 4, "n_layers": 3,
    "num_heads": 4, "num_layers": 3, "is_decoder": True, "decoder_layers": 3, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}  # fmt: skip
MOST_NUMBERS = 30_000_000


def build_tiny(model_type, automodel=AutoModelForCausalLM, sizes=SIZES):
    """A tiny model of a type, or a skip that says why there is none."""
    settings = dict(sizes)
    while True:
        try:
            config = CONFIG_MAPPING[model_type](**settings)
            with torch.device("meta"):
                numbers = sum(weight.numel() for weight in automodel.from_config(config).parameters())
            break
        except Exception as error:
            refused = [key for key in settings if re.search(rf"\b{key}\b", str(error))]
            if not refused:
                pytest.skip(f"no tiny configuration by common sizes: {type(error).__name__}: {str(error)[:80]}")
            del settings[refused[0]]
    if numbers > MOST_NUMBERS:
        pytest.skip(f"no tiny configuration by common sizes: {numbers:,} numbers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = automodel.from_config(config).double().eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model.requires_grad_(False)


def why_refused(model):
    """The reason a model is refused for, or None."""
    try:
        inspect_model(model)
    except UnsupportedModelError as refusal:
        return str(refusal)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_a_model_is_exact_or_refused(model_type, make_ids):
    model = build_tiny(model_type)
    refusal = why_refused(model)
    if refusal is not None:
        assert re.fullmatch(rf"{type(model).__name__}: [^\n]+", refusal)
        return
    text, ids = make_ids(4, seed=4), make_ids(2, 5)
    card = BaseCard(id="tiny", fingerprint=fingerprint(model))
    with KeepFloat64():
        expected = model(input_ids=torch.cat([text.expand(2, -1), ids], dim=1), use_cache=False).logits[:, 4:]
        plain = model(input_ids=ids, use_cache=False).logits
        with attach(model, [Prefix.from_states(text_states(model, text), base=card), None]):
            found = model(input_ids=ids, use_cache=False).logits
    assert float((expected - plain).abs().max()) > 1e-3
    torch.testing.assert_close(found, torch.stack([expected[0], plain[1]]), rtol=1e-10, atol=1e-10)
