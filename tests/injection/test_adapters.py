"""LoRA and its kin, put in by PEFT, work beside a prefix: together they answer and learn as the algebra says."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit import Prefix, PrefixEncoder, PrefixStates, attach
from prefixkit.errors import BaseMismatchError, UnsupportedModelError
from prefixkit.models.adapters import base_weights, has_adapters, is_merged
from prefixkit.models.fingerprint import fingerprint
from prefixkit.models.inspect import inspect_model

Make = Callable[..., Any]
TARGETS = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "v_proj", "down_proj"], "opt": ["k_proj", "fc1"]}


@pytest.fixture(params=sorted(TARGETS))
def model(request: pytest.FixtureRequest, make_model: Make) -> PreTrainedModel:
    return make_model(request.param, fresh=True)


def add_lora(model: PreTrainedModel, **settings: Any) -> Any:
    """LoRA with both factors random: at its usual start it would change nothing, and a test would prove nothing."""
    settings = {"r": 2, "target_modules": TARGETS[model.config.model_type], "init_lora_weights": False} | settings
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).double().eval()


def left_padded(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return mask


@pytest.mark.parametrize("door", ["PeftModel", "base model", "LoraModel"])
def test_a_prefix_beside_lora_answers_as_with_merged_weights_and_a_cache(
    door: str, model: PreTrainedModel, make_prefix: Make, make_ids: Make, cache_logits: Callable[..., Tensor]
) -> None:
    prefix = make_prefix(model)
    own = fingerprint(model)
    lora = add_lora(model)
    merged = copy.deepcopy(lora).merge_and_unload()
    ids = make_ids(2, 9)
    mask = left_padded(ids)
    expected = cache_logits(merged, prefix.states, ids, mask)
    target = {"PeftModel": lora, "base model": lora.get_base_model(), "LoraModel": lora.base_model}[door]
    before = lora(input_ids=ids, attention_mask=mask).logits
    weights = {name: weight.clone() for name, weight in lora.state_dict().items()}
    with attach(target, prefix):
        found = lora(input_ids=ids, attention_mask=mask).logits
        with lora.disable_adapter():
            without_lora = lora(input_ids=ids, attention_mask=mask).logits
    seen = mask.bool()
    torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=1e-10)
    assert (found - before)[seen].abs().max() > 0.1
    assert (found - without_lora)[seen].abs().max() > 0.01
    assert torch.equal(lora(input_ids=ids, attention_mask=mask).logits, before)
    assert all(torch.equal(weights[name], weight) for name, weight in lora.state_dict().items())
    assert fingerprint(lora.get_base_model()) == own


def test_lora_and_prefix_learn_together(model: PreTrainedModel, make_ids: Make) -> None:
    from transformers import DynamicCache

    lora = add_lora(model)
    encoder = PrefixEncoder(inspect_model(model).geometry, [3, 3, 3], depth=2, width=6, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(6)
        for parameter in encoder.parameters():
            nn.init.normal_(parameter, std=0.5)
    ids = make_ids(2, 9)
    learning = [p for p in lora.parameters() if p.requires_grad] + list(encoder.parameters())
    states: PrefixStates = encoder()
    cache = DynamicCache()
    for layer, site in enumerate(states.sites):
        cache.update(site.key.expand(2, -1, -1, -1), site.value.expand(2, -1, -1, -1), layer)
    expected = torch.autograd.grad(lora(input_ids=ids, past_key_values=cache, labels=ids).loss, learning)
    with attach(lora, encoder):
        found = torch.autograd.grad(lora(input_ids=ids, labels=ids).loss, learning)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        assert ours.abs().max() > 0


def test_rows_with_and_without_a_prefix_generate_beside_lora(
    model: PreTrainedModel, make_prefix: Make, make_ids: Make
) -> None:
    prefix = make_prefix(model)
    lora = add_lora(model)
    ids = make_ids(2, 5)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "num_beams": 2}
    with attach(lora, [prefix, None]):
        both = lora.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    with attach(lora, prefix):
        first = lora.generate(input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1]), **options)
    second = lora.generate(input_ids=ids[1:], attention_mask=torch.ones_like(ids[1:]), **options)
    assert torch.equal(both, torch.cat([first, second]))


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "IA3", "modules_to_save", "transformers' own", "two adapters"])
def test_the_fingerprint_is_that_of_the_base_whatever_is_in_it(kind: str, make_model: Make) -> None:
    model = make_model("llama", fresh=True)
    names, own = set(model.state_dict()), fingerprint(model)
    if kind == "IA3":
        get_peft_model(model, IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]))
    elif kind == "transformers' own":
        try:
            model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        except ValueError as refusal:
            if "version of PEFT" not in str(refusal):
                raise
            pytest.skip(f"this transformers wants another PEFT: {refusal}")
    else:
        extra = {"DoRA": {"use_dora": True}, "modules_to_save": {"modules_to_save": ["lm_head"]}}.get(kind, {})
        lora = add_lora(model, **extra)
        if kind == "two adapters":
            lora.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    assert has_adapters(model)
    assert len(model.state_dict()) > len(names)
    assert set(base_weights(model)) == names
    assert fingerprint(model) == own
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert fingerprint(model) != own


def test_merging_while_a_prefix_is_attached_changes_no_answer(
    model: PreTrainedModel, make_prefix: Make, make_ids: Make
) -> None:
    lora = add_lora(model)
    ids = make_ids(2, 9)
    with attach(lora, make_prefix(model)):
        apart = lora(input_ids=ids).logits
        lora.merge_adapter()
        torch.testing.assert_close(lora(input_ids=ids).logits, apart, rtol=0, atol=1e-10)
        lora.unmerge_adapter()
        torch.testing.assert_close(lora(input_ids=ids).logits, apart, rtol=0, atol=1e-10)


def test_merged_weights_are_another_base_until_they_are_unmerged(
    model: PreTrainedModel, make_prefix: Make, make_ids: Make
) -> None:
    prefix = make_prefix(model)
    lora = add_lora(model)
    attach(lora, prefix).detach()  # the fingerprint is known from here on
    lora.merge_adapter()
    assert is_merged(model)
    with pytest.raises(
        BaseMismatchError, match=re.escape("take the adapters merged into it out again with unmerge_adapter()")
    ):
        attach(lora, prefix)
    lora.unmerge_adapter()
    assert not is_merged(model)
    attach(lora, prefix).detach()
    plain = lora.merge_and_unload()
    with pytest.raises(BaseMismatchError, match="the model at hand is .*; load that base model"):
        attach(plain, prefix)


def test_weights_merged_for_good_are_noticed_though_the_fingerprint_was_known(
    make_model: Make, make_prefix: Make
) -> None:
    model = make_model("llama", fresh=True)
    prefix = make_prefix(model)
    attach(model, prefix).detach()
    plain = add_lora(model).merge_and_unload()
    assert plain is model
    with pytest.raises(BaseMismatchError, match="load that base model"):
        attach(plain, prefix)


def test_a_model_with_pefts_own_virtual_tokens_is_refused(make_model: Make, make_prefix: Prefix) -> None:
    model = make_model("llama", fresh=True)
    tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(
        UnsupportedModelError,
        match=r"PEFT's PREFIX_TUNING puts virtual tokens of its own before the text; take its get_base_model\(\)",
    ):
        attach(tuned, None)
