"""Deltas of an artefact in a model: beside prefixes, in caches, in mixed batches, switched and turned off."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from methods.conftest import METHODS, config_of
from prefixkit.errors import ArtefactError, InjectionError, UnsupportedModelError
from prefixkit.injection import attach
from prefixkit.methods import build_delta
from prefixkit.models.fingerprint import fingerprint, weights_hash
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import BaseCard, Prefix, PrefixEncoder, PrefixStates

Make = Callable[..., Any]


@pytest.fixture
def model(make_model: Make) -> PreTrainedModel:
    return make_model("llama", fresh=True)


@pytest.fixture
def make_hybrid(make_states: Make, make_delta: Make) -> Make:
    """A factory of artefacts: a prefix of 3 virtual tokens, or none, and a delta."""

    def make(model: PreTrainedModel, name: str = "lora", *, length: int = 3, seed: int = 0) -> Prefix:
        empty = PrefixStates.empty(inspect_model(model).geometry)
        states = make_states(model, length) if length else empty
        base = BaseCard(id="tiny", fingerprint=fingerprint(model))
        return Prefix.from_states(states, base=base, deltas=[make_delta(model, name, seed=seed).materialise()])

    return make


def logits(model: PreTrainedModel, ids: Tensor, prefix: Any) -> Tensor:
    with attach(model, prefix):
        found: Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("all_float64")
def test_a_hybrid_is_its_prefix_in_front_of_the_changed_model(
    name: str, make_model: Make, make_hybrid: Make, make_ids: Make, cache_logits: Make
) -> None:
    """The oracle: the prefix as a filled cache of the model with the delta in it."""
    model = make_model("gpt2", fresh=True)
    hybrid, ids = make_hybrid(model, name), make_ids(2, 6)
    with attach(model, hybrid.without("prefix")):
        changed = copy.deepcopy(model.state_dict())
        assert changed
        alone = model(ids).logits
    found = logits(model, ids, hybrid)
    handle = attach(model, hybrid.without(name_of(hybrid)))
    handle.switch(hybrid)
    torch.testing.assert_close(model(ids).logits, found, rtol=1e-12, atol=1e-12)
    handle.switch(hybrid.without("prefix"))
    torch.testing.assert_close(model(ids).logits, alone, rtol=1e-12, atol=1e-12)
    handle.switch(None)
    handle.detach()
    from prefixkit.methods import restore_delta

    undo = restore_delta(model, hybrid.deltas[0]).insert()  # without attach: plain transformers
    expected = cache_logits(model, hybrid.states, ids, None)
    undo()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def name_of(hybrid: Prefix) -> str:
    return str(hybrid.deltas[0].method)


def test_turned_off_parts_leave_the_base_model(model: PreTrainedModel, make_hybrid: Make, make_ids: Make) -> None:
    hybrid, ids = make_hybrid(model), make_ids(2, 6)
    before, weights = model(ids).logits, weights_hash(model)
    neither = hybrid.without("prefix", "lora")
    assert (hybrid.parts, neither.parts) == (("prefix", "lora"), ())
    assert neither.position_offset == hybrid.position_offset == 3
    torch.testing.assert_close(logits(model, ids, neither), before, rtol=1e-5, atol=1e-5)  # rotary: moved as a whole
    found = [logits(model, ids, each) for each in (hybrid, hybrid.without("lora"), hybrid.without("prefix"))]
    assert all((one - other).abs().max() > 1e-3 for i, one in enumerate(found) for other in (*found[:i], before))
    assert weights_hash(model) == weights
    with pytest.raises(ArtefactError, match="adapter: not a part of this artefact, which has prefix, lora"):
        hybrid.without("adapter")


def test_it_is_saved_and_loaded_as_one(
    model: PreTrainedModel, make_hybrid: Make, make_ids: Make, tmp_path: Any
) -> None:
    hybrid, ids = make_hybrid(model), make_ids(2, 6)
    saved = hybrid.save(tmp_path / "a")
    again = Prefix.load(tmp_path / "a")
    assert torch.equal(logits(model, ids, again), logits(model, ids, hybrid))
    assert again.card == saved.card
    plain = hybrid.without("lora").save(tmp_path / "b")
    assert "deltas" not in plain.card.to_json()
    assert plain.card.content_hash != saved.card.content_hash


def loaded_again(prefix: Prefix, folder: Path) -> Prefix:
    """The same artefact from a file, with tensors of its own."""
    prefix.save(folder / "again")
    return Prefix.load(folder / "again")


def test_a_batch_of_differing_prefixes_takes_one_delta(
    model: PreTrainedModel, make_hybrid: Make, make_prefix: Make, make_ids: Make, tmp_path: Path
) -> None:
    hybrid, ids = make_hybrid(model), make_ids(2, 6)
    bare = hybrid.without("prefix")
    whole = logits(model, ids, [hybrid, bare])
    torch.testing.assert_close(whole[:1], logits(model, ids[:1], hybrid))
    torch.testing.assert_close(whole[1:], logits(model, ids[1:], bare))
    assert torch.equal(
        logits(model, ids, [hybrid, loaded_again(hybrid, tmp_path)]), logits(model, ids, [hybrid, hybrid])
    )
    for rows in ([hybrid, None], [hybrid, make_prefix(model)], [hybrid, make_hybrid(model, seed=1)]):
        with pytest.raises(InjectionError, match="lora changes the layers for all rows of a batch at once"):
            attach(model, rows)
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("length", [0, 3])
def test_a_cache_goes_on_under_the_same_delta_alone(
    length: int, model: PreTrainedModel, make_hybrid: Make, make_ids: Make
) -> None:
    hybrid, ids = make_hybrid(model, length=length), make_ids(2, 6)
    other = make_hybrid(model, length=length, seed=1)
    with attach(model, hybrid) as handle:
        whole = model(ids).logits
        cache = model(ids[:, :4], use_cache=True).past_key_values
        torch.testing.assert_close(model(ids[:, 4:], past_key_values=copy.deepcopy(cache)).logits, whole[:, 4:])
        handle.switch(other)
        with pytest.raises(InjectionError, match="past_key_values"):
            model(ids[:, 4:], past_key_values=cache)
    with pytest.raises(InjectionError, match="past_key_values"):
        model(ids[:, 4:], past_key_values=cache)


def test_generate_equals_full_recomputation(model: PreTrainedModel, make_hybrid: Make, make_ids: Make) -> None:
    hybrid, ids = make_hybrid(model), make_ids(2, 4)
    with attach(model, hybrid):
        text = model.generate(ids, do_sample=False, max_new_tokens=6, eos_token_id=None)
        for _ in range(6):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(dim=1, keepdim=True)], dim=1)
    assert torch.equal(text, ids)


def test_a_switch_that_fails_leaves_what_was_attached(
    model: PreTrainedModel, make_hybrid: Make, make_ids: Make
) -> None:
    hybrid, ids = make_hybrid(model), make_ids(2, 6)
    strange = make_hybrid(model, seed=1)
    strange.deltas[0].tensors.pop(next(iter(strange.deltas[0].tensors)))
    with attach(model, hybrid) as handle:
        before = model(ids).logits
        with pytest.raises(ArtefactError, match="lora: .* is missing"):
            handle.switch(strange)
        assert torch.equal(model(ids).logits, before)


def test_an_attach_that_fails_leaves_nothing(model: PreTrainedModel, make_hybrid: Make, make_ids: Make) -> None:
    strange, ids = make_hybrid(model), make_ids(2, 6)
    strange.deltas[0].tensors.pop(next(iter(strange.deltas[0].tensors)))
    before = model(ids).logits
    with pytest.raises(ArtefactError, match="is missing"):
        attach(model, strange)
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(logits(model, ids, None), before)


def test_adapters_of_peft_and_a_delta_of_the_same_kind_do_not_mix(model: PreTrainedModel, make_hybrid: Make) -> None:
    hybrid = make_hybrid(model)
    lora = get_peft_model(model, LoraConfig(r=2))
    with pytest.raises(UnsupportedModelError, match="lora: the model has adapters of PEFT already"):
        attach(lora, hybrid)
    with attach(lora, hybrid.without("lora")):
        pass


@pytest.mark.parametrize("name", ["full", "lora"])
def test_detaching_before_a_checkpointed_backward_pass_is_an_error(
    name: str, make_model: Make, make_delta: Make, make_ids: Make
) -> None:
    """Recomputed without the delta, the gradients would be wrong."""
    model = make_model("gpt2", fresh=True).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    delta, ids = make_delta(model, name), make_ids(2, 6)
    with attach(model, None, deltas=[delta]):
        loss = model(ids, labels=ids).loss
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize("name", ["lora", "houlsby", "pfeiffer", "parallel"])
def test_its_cost_is_what_torch_counts(name: str, make_model: Make, make_hybrid: Make, make_ids: Make) -> None:
    model = make_model("gpt2", fresh=True)
    model.set_attn_implementation("eager")
    hybrid, ids = make_hybrid(model, name), make_ids(1, 1)

    def flops(prefix: Prefix | None) -> int:
        with attach(model, prefix), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids)
        return int(counter.get_total_flops())

    method = name_of(hybrid)
    vectors = sum(t.numel() for t in hybrid.deltas[0].tensors.values() if t.dim() == 1)  # added, not multiplied
    assert flops(hybrid) - flops(None) == hybrid.flops_per_token - 2 * vectors
    assert flops(hybrid.without(method)) - flops(None) == hybrid.states.flops_per_token
    assert hybrid.nbytes == sum(site.key.nbytes + site.value.nbytes for site in hybrid.states.sites) + sum(
        tensor.nbytes for tensor in hybrid.deltas[0].tensors.values()
    )


def test_weights_that_stand_in_the_place_of_others_cost_nothing(make_model: Make, make_delta: Make) -> None:
    model = make_model("gpt2", fresh=True)
    found = {
        name: make_delta(model, name).materialise() for name in ("full", "top-layers", "bitfit", "bitfit-added", "ia3")
    }
    assert [found[name].flops_per_token for name in ("full", "top-layers", "bitfit")] == [0, 0, 0]
    assert all(found[name].flops_per_token == found[name].num_parameters for name in ("bitfit-added", "ia3"))


def test_a_delta_of_another_model_is_refused(make_model: Make, make_delta: Make) -> None:
    one, other = make_model("llama", fresh=True), make_model("llama", fresh=True)
    with pytest.raises(InjectionError, match="lora: was made for the layers of another model"):
        attach(other, None, deltas=[make_delta(one, "lora")])


def test_switch_takes_what_attach_takes(
    model: PreTrainedModel, make_delta: Make, make_states: Make, make_ids: Make
) -> None:
    delta, ids = make_delta(model, "lora"), make_ids(2, 6)
    encoder = PrefixEncoder(
        inspect_model(model).geometry, inspect_model(model).geometry.lengths(3), dtype=torch.float64
    )
    with attach(model, encoder, deltas=[delta], infix=True) as handle, handle.infix_at(torch.tensor([3])):
        expected = model(ids).logits
        handle.switch(encoder)
        assert (model(ids).logits - expected).abs().max() > 1e-3
        handle.switch(encoder, deltas=[delta], infix=True)
        assert torch.equal(model(ids).logits, expected)


def test_attaching_draws_nothing_from_torchs_generator(
    model: PreTrainedModel, make_hybrid: Make, make_ids: Make
) -> None:
    hybrid = make_hybrid(model)
    before = torch.get_rng_state()
    with attach(model, hybrid):
        assert torch.equal(torch.get_rng_state(), before)


def test_rest_and_the_guard_know_of_deltas(model: PreTrainedModel, make_delta: Make, make_ids: Make) -> None:
    calls: list[int] = []
    with attach(model, None, deltas=[make_delta(model, "lora")], guard=lambda: calls.append(1)) as handle:
        model(make_ids(2, 3))
        assert calls
        with pytest.raises(InjectionError, match="rest: layers are changed for all threads"):
            handle.rest()


def test_encoder_outputs_belong_to_the_delta_they_were_computed_under() -> None:
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    geometry, source = inspect_model(model).geometry, torch.tensor([[3, 4, 5]])
    ones = torch.tensor([[0, 7]])

    def lora(seed: int) -> Prefix:
        delta = build_delta(model, config_of("lora"), torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for number in delta.numbers:
                number.add_(1.0)
        base = BaseCard(id="t5")
        return Prefix.from_states(PrefixStates.empty(geometry), base=base, deltas=[delta.materialise()])

    one, other = lora(0), lora(1)
    bare = model.encoder(source)
    with attach(model, one):
        with pytest.raises(InjectionError, match="encoder_outputs"):
            model(encoder_outputs=bare, decoder_input_ids=ones)
        own = model.encoder(source)
        whole = model(input_ids=source, decoder_input_ids=ones).logits
        torch.testing.assert_close(model(encoder_outputs=own, decoder_input_ids=ones).logits, whole)
    with attach(model, other), pytest.raises(InjectionError, match="encoder_outputs"):
        model(encoder_outputs=own, decoder_input_ids=ones)


def test_a_models_own_way_of_being_saved_is_kept(
    model: PreTrainedModel, make_hybrid: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Any] = []
    monkeypatch.setattr(type(model), "save_pretrained", lambda self, folder: saved.append(folder), raising=False)
    with attach(model, make_hybrid(model).without("lora")):
        model.save_pretrained(tmp_path)
    assert saved == [tmp_path]


@pytest.mark.parametrize("name", METHODS)
def test_a_base_model_is_not_saved_with_changed_layers(
    name: str, model: PreTrainedModel, make_hybrid: Make, make_ids: Make, tmp_path: Path
) -> None:
    ids = make_ids(2, 6)
    before, kind = model(ids).logits, config_of(name).kind
    with attach(model, make_hybrid(model, name)):
        message = rf"^save_pretrained: {kind} has changed this model's layers, and would be saved as its own weights"
        with pytest.raises(InjectionError, match=message):
            model.save_pretrained(tmp_path / "base")
        assert not (tmp_path / "base").exists()
    with attach(model, make_hybrid(model, name).without(kind)):  # a prefix alone changes no layer
        model.save_pretrained(tmp_path / "base")
    assert "save_pretrained" not in vars(model)
    assert torch.equal(type(model).from_pretrained(tmp_path / "base", dtype=model.dtype)(ids).logits, before)
