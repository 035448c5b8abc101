"""An infix answers and learns as keys and values put into the cache behind the input, and the input does not see it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from prefixkit.data import NO_LOSS, input_ends
from prefixkit.errors import ArtefactError, ExportError, InjectionError, UnsupportedModelError
from prefixkit.export import to_peft
from prefixkit.injection import attach
from prefixkit.models.fingerprint import fingerprint
from prefixkit.peft import PeftModel
from prefixkit.prefix import BaseCard, Prefix, PrefixEncoder, PrefixStates

Make = Callable[..., Any]
P = 3


def as_infix(model: PreTrainedModel, states: PrefixStates) -> Prefix:
    return Prefix.from_states(states, base=BaseCard(id="tiny", fingerprint=fingerprint(model)), infix=True)


def cached(model: PreTrainedModel, states: PrefixStates, row: Tensor, start: int) -> Tensor:
    """Logits of one row: the input but for its last token, then the infix into the cache, then the rest behind it."""
    cache, positions = DynamicCache(config=model.config), torch.arange(row.shape[1])[None]
    positions = positions + P * (positions >= start)
    logits = []
    if start:
        logits.append(model(row[:, :start], past_key_values=cache, use_cache=True).logits)
    for layer, site in enumerate(states.sites):
        cache.update(site.key[None], site.value[None], layer)
    mask = torch.ones(1, row.shape[1] + P, dtype=torch.long)
    rest = model(row[:, start:], past_key_values=cache, attention_mask=mask, position_ids=positions[:, start:])
    return torch.cat([*logits, rest.logits], dim=1)


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("all_float64")
def test_it_equals_keys_and_values_in_the_cache_behind_the_input_with_gradients(
    global_family: str, attention: str, make_model: Make, make_states: Make, make_ids: Make
) -> None:
    if global_family == "opt":
        pytest.skip("the oracle's second call cannot say OPT's positions; generation below covers the family")
    model = make_model(global_family, attention)
    states, ids = make_states(model, P, grad=True), make_ids(3, 8)
    starts = [0, 2, 5]
    dice = torch.Generator().manual_seed(3)
    weights = torch.randn(3, 8, 97, dtype=torch.float64, generator=dice)
    expected = torch.cat([cached(model, states, ids[i : i + 1], start) for i, start in enumerate(starts)])
    tensors = [tensor for site in states.sites for tensor in (site.key, site.value)]
    gradients = torch.autograd.grad((expected * weights).sum(), tensors)
    encoder = PrefixEncoder(states.geometry, states.lengths, dtype=torch.float64)
    with torch.no_grad():
        for pair, site in zip(encoder.states, states.sites, strict=True):
            pair.copy_(torch.stack([site.key, site.value]))
    with attach(model, encoder, infix=True) as handle, handle.infix_at(torch.tensor(starts)):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        (logits * weights).sum().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    found = [part for pair in encoder.states for part in pair.grad]
    torch.testing.assert_close(found, list(gradients), rtol=1e-9, atol=1e-10)


def test_the_input_does_not_see_it(make_model: Make, make_states: Make, make_ids: Make) -> None:
    model = make_model("llama")
    ids = make_ids(2, 8)
    plain = model(ids).logits
    with attach(model, as_infix(model, make_states(model, P))) as handle, handle.infix_at(torch.tensor([4, 6])):
        found = model(ids).logits
    for row, start in enumerate((4, 6)):
        torch.testing.assert_close(found[row, :start], plain[row, :start])
        assert (found[row, start:] - plain[row, start:]).abs().amax(dim=1).min() > 1e-4


@pytest.mark.usefixtures("all_float64")
def test_at_the_first_token_it_is_a_prefix(
    global_family: str, make_model: Make, make_states: Make, make_ids: Make
) -> None:
    model = make_model(global_family)
    states, ids = make_states(model, P), make_ids(2, 6)
    with attach(model, Prefix.from_states(states, base=BaseCard(id="tiny"))):
        expected = model(ids).logits
    with attach(model, as_infix(model, states)) as handle, handle.infix_at(torch.tensor([0])):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_generate_puts_it_behind_the_prompt(
    family: str, beams: int, make_model: Make, make_states: Make, make_ids: Make
) -> None:
    """Greedy: token by token without a cache. Beams: as one row alone, padding and all."""
    model = make_model(family)
    infix, ids = as_infix(model, make_states(model, P)), make_ids(2, 5)
    options = {"do_sample": False, "max_new_tokens": 5, "num_beams": beams, "eos_token_id": None}
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with attach(model, infix) as handle:
        text = model.generate(ids, attention_mask=mask, **options)
        alone = model.generate(ids[1:, 2:], attention_mask=mask[1:, 2:], **options)
        assert torch.equal(text[1, 5:], alone[0, 3:])
        if beams == 1:
            grown = ids[:1]
            with handle.infix_at(torch.tensor([4])):
                for _ in range(5):
                    grown = torch.cat([grown, model(grown, use_cache=False).logits[:, -1:].argmax(dim=2)], dim=1)
            assert torch.equal(text[:1], grown)
    assert not torch.equal(text, model.generate(ids, attention_mask=mask, **options))


def test_gradient_checkpointing_changes_nothing(make_model: Make, make_states: Make, make_ids: Make) -> None:
    model = make_model("llama", fresh=True).float().train()
    states, ids = make_states(model, P), make_ids(2, 6)
    encoder, found = PrefixEncoder(states.geometry, states.lengths), []
    for on in (False, True):
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with attach(model, encoder, infix=True) as handle:
            with handle.infix_at(torch.tensor([2, 4])):
                loss = model(ids, labels=ids).loss
            loss.backward()
        found.append([number.grad.clone() for number in encoder.parameters()])
        encoder.zero_grad()
    torch.testing.assert_close(found[0], found[1])


def test_the_input_ends_before_the_first_token_that_is_scored() -> None:
    no = NO_LOSS
    labels = torch.tensor([[no, no, no, 7, 8, no], [no, 5, 6, no, no, no], [4, 5, 6, 7, no, no], [no] * 6])
    assert input_ends(labels).tolist() == [2, 0, 0, 0]


def test_it_is_saved_as_what_it_is(make_model: Make, make_states: Make, make_ids: Make, tmp_path: Path) -> None:
    model = make_model("llama")
    infix = as_infix(model, make_states(model, P)).save(tmp_path)
    again = Prefix.load(tmp_path)
    assert again.is_infix
    assert again.card == infix.card
    prefix = Prefix.from_states(infix.states, base=infix.card.base)
    assert not prefix.is_infix
    assert "infix" not in prefix.card.to_json()
    with pytest.raises(ExportError, match="cannot say an infix"):
        to_peft(again, tmp_path / "peft", model)
    with pytest.raises(ArtefactError, match="is an infix, no prefix"):
        PeftModel.from_pretrained(model, tmp_path)


def test_where_it_stands_must_be_known(make_model: Make, make_states: Make, make_ids: Make) -> None:
    model = make_model("llama")
    infix, ids = as_infix(model, make_states(model, P)), make_ids(2, 5)
    prefix = Prefix.from_states(infix.states, base=infix.card.base)
    with attach(model, infix) as handle:
        with pytest.raises(InjectionError, match="where the input ends was not said; call generate, or use handle"):
            model(ids)
        with handle.infix_at(torch.tensor([1, 2, 3])), pytest.raises(InjectionError, match="each of 2 rows, got 3"):
            model(ids)
        with handle.infix_at(torch.tensor([2])):
            cache = model(ids[:, :4], use_cache=True).past_key_values
        with pytest.raises(InjectionError, match="give generate the prompt, and no cache"):
            model.generate(ids, past_key_values=cache, max_new_tokens=2)
        handle.switch(prefix)
        with pytest.raises(InjectionError, match="past_key_values"):
            model(ids[:, 4:], past_key_values=cache)
    with pytest.raises(InjectionError, match="an infix and a prefix stand at different places"):
        attach(model, [infix, prefix])
    with pytest.raises(InjectionError, match="a saved prefix knows whether it is one"):
        attach(model, prefix, infix=True)


def test_models_that_do_not_read_in_order_are_refused() -> None:
    from transformers import BertConfig, BertModel

    from prefixkit.models.inspect import inspect_model

    bert = BertModel(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=16)).eval()  # fmt: skip
    geometry = inspect_model(bert).geometry
    with pytest.raises(UnsupportedModelError, match="infix: BertModel is no decoder-only model"):
        attach(bert, PrefixEncoder(geometry, geometry.lengths(2)), infix=True)


@pytest.mark.parametrize("asked", [{"guidance_scale": 2.0}, {"assistant_early_exit": 1}])
def test_what_reads_other_prompts_beside_is_refused(
    make_model: Make, make_states: Make, make_ids: Make, asked: dict[str, Any]
) -> None:
    """The unconditional branch of guidance has a shorter prompt, behind which the infix would not stand."""
    model = make_model("llama", fresh=True)
    ids = make_ids(1, 6)
    with attach(model, as_infix(model, make_states(model, P))):
        with pytest.raises(InjectionError, match=rf"^{next(iter(asked))}: reads other prompts, or fewer"):
            model.generate(ids, max_new_tokens=2, do_sample=False, **asked)
        assert model.config.num_hidden_layers == 3
        model.generate(ids, max_new_tokens=2, do_sample=False, guidance_scale=1)
