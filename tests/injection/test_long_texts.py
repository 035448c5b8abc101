"""Numbers that depend on how long the whole text is: longrope's rotary angles, Llama 4's scale."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from conformance.families import VOCABULARY, build_model
from conformance.reference import reading
from prefixkit.errors import InjectionError
from prefixkit.injection import attach
from prefixkit.models.inspect import inspect_model

SWITCH = 16
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": SWITCH}  # fmt: skip
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
         "initializer_range": 0.2}  # fmt: skip
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
CHANGES = rf"rotary embedding \(longrope\) changes for all tokens at once beyond {SWITCH} positions"


@pytest.fixture(scope="module", params=["llama", "phi3"])
def model(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if request.param == "llama":
            made = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LONGROPE))
        else:
            rope = LONGROPE | {"partial_rotary_factor": 1.0}
            made = Phi3ForCausalLM(
                Phi3Config(**SIZES, rope_parameters=rope, original_max_position_embeddings=SWITCH, resid_pdrop=0.0)
            )
    return made.double().eval().requires_grad_(False)


def test_the_switch_is_known(model, make_model):
    assert inspect_model(model).rope_switch == SWITCH
    assert inspect_model(make_model("llama")).rope_switch is None


@pytest.mark.parametrize("tokens", [5, SWITCH - 3, SWITCH - 2, 30])
@pytest.mark.usefixtures("all_float64")
def test_a_text_on_one_side_is_exact(tokens, model, make_prefix, make_ids):
    prefix, ids = make_prefix(model, 3), make_ids(2, tokens)
    with reading(model, [prefix.states]):
        expected = model(input_ids=ids, position_ids=3 + torch.arange(tokens)[None]).logits
    with attach(model, prefix):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("all_float64")
def test_rows_on_both_sides_are_refused_and_rows_on_one_are_themselves(model, make_prefix, make_ids):
    prefix, ids = make_prefix(model, 3), make_ids(2, SWITCH)
    with attach(model, [prefix, None]):
        with pytest.raises(InjectionError, match=f"{CHANGES}, .*some rows of this batch are longer, some"):
            model(input_ids=ids)
        short, long = ids[:, : SWITCH - 3], make_ids(2, SWITCH + 1)
        mixed = [model(input_ids=short).logits, model(input_ids=long).logits]
    for row, each in enumerate([prefix, None]):
        with attach(model, each):
            alone = [model(input_ids=short[row, None]).logits[0], model(input_ids=long[row, None]).logits[0]]
        for one, together in zip(alone, mixed, strict=True):
            torch.testing.assert_close(together[row], one, rtol=0, atol=1e-10)


def test_generating_across_it_is_exact_without_a_cache_and_refused_with_one(model, make_prefix, make_ids):
    prefix, ids = make_prefix(model, 3), make_ids(1, 8)
    room = SWITCH - 3 - ids.shape[1]
    with attach(model, prefix):
        expected = model.generate(ids, use_cache=False, max_new_tokens=room + 5, **GREEDY)
        assert torch.equal(model.generate(ids, max_new_tokens=room, **GREEDY), expected[:, : ids.shape[1] + room])
        with pytest.raises(InjectionError, match=f"{CHANGES}, .*crosses it with a cache; set use_cache=False"):
            model.generate(ids, max_new_tokens=room + 5, **GREEDY)
        long = make_ids(1, SWITCH + 4)
        cached, full = (model.generate(long, use_cache=use, max_new_tokens=6, **GREEDY) for use in (True, False))
        assert torch.equal(cached, full)
        steps = [ids]
        for _ in range(room + 5):
            steps.append(model(input_ids=torch.cat(steps, 1)).logits[:, -1:].argmax(-1))
        assert torch.equal(torch.cat(steps, 1), expected)


def test_a_scale_that_counts_text_alone_is_refused_where_it_would_differ(make_prefix, make_ids):
    """Llama 4 scales the queries of layers without rotary angles by the number of columns, not by position ids."""
    model = build_model("llama4", floor_scale=8)
    prefix, ids = make_prefix(model, 3), make_ids(2, 5)
    assert inspect_model(model).scale_switch == 8
    assert inspect_model(build_model("llama4", attn_temperature_tuning=False)).scale_switch is None
    with reading(model, [prefix.states]):
        expected = model(input_ids=ids[:, :4], position_ids=3 + torch.arange(4)[None]).logits
    with attach(model, prefix):
        torch.testing.assert_close(model(input_ids=ids[:, :4]).logits, expected, rtol=0, atol=1e-10)
        with pytest.raises(InjectionError, match="from 8 tokens on the base model scales .* and text have 8: sh"):
            model(input_ids=ids)
