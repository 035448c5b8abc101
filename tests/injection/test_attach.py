"""Attaching changes nothing that detaching does not restore, and refuses what it cannot do exactly."""

from pathlib import Path

import pytest
import torch

from prefixkit.errors import BaseMismatchError, InjectionError
from prefixkit.injection import attach
from prefixkit.injection.attached import require_attachable
from prefixkit.models import load_base_model
from prefixkit.models.fingerprint import fingerprint, weights_hash
from prefixkit.models.text_states import text_states
from prefixkit.prefix import BaseCard, Prefix, PrefixEncoder


@pytest.fixture
def ids(make_ids):
    return make_ids(3, 9, seed=5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_nothing_attached_and_detached_equal_the_base_model_bit_for_bit(
    make_model, make_prefix, make_states, family, attention, ids
):
    model = make_model(family, attention)
    implementation = model.config._attn_implementation
    before, weights = model(ids).logits, weights_hash(model)
    with attach(model, None):
        assert torch.equal(model(ids).logits, before)
    with attach(model, [None, None, None]):
        assert torch.equal(model(ids).logits, before)

    def go_wrong_inside():
        with attach(model, [make_prefix(model, [2, 2, 2]), None, None]):
            assert not torch.allclose(model(ids).logits[0], before[0])
            raise KeyError("something went wrong inside")

    with pytest.raises(KeyError):
        go_wrong_inside()
    assert torch.equal(model(ids).logits, before)
    assert weights_hash(model) == weights
    assert model.config._attn_implementation == implementation
    assert "generate" not in vars(model)
    assert not any(hasattr(part, "_prefixkit_slot") or part._forward_pre_hooks for part in model.modules())


def test_attaching_twice_is_refused_and_detaching_twice_is_not(make_model, make_prefix, make_states, ids):
    model = make_model("llama")
    handle = attach(model, make_prefix(model, [2, 2, 2]))
    with pytest.raises(InjectionError, match="attached to this model already; detach it first"):
        attach(model, make_prefix(model, [2, 2, 2]))
    handle.detach()
    handle.detach()
    with attach(model, make_prefix(model, [2, 2, 2])):
        model(ids)


def test_what_is_attached_stays_what_it_was(make_model, make_prefix, ids):
    model = make_model("llama")
    prefix = make_prefix(model, [2, 2, 2])
    with attach(model, prefix):
        before = model(ids).logits
        prefix.states.sites[0].key.mul_(3)
        assert torch.equal(model(ids).logits, before)


def test_the_encoder_runs_once_per_forward_pass_whatever_the_batch(make_model, make_prefix, make_states, ids):
    model = make_model("llama")
    encoder = PrefixEncoder(make_states(model, [3, 3, 3]).geometry, (3, 3, 3), depth=2, width=8, dtype=torch.float64)
    rows = []
    encoder.last.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    with attach(model, encoder):
        model(ids)
    assert rows == [3]


def test_a_plain_forward_with_another_number_of_rows_is_refused(make_model, make_prefix, make_states, ids):
    model = make_model("llama")
    with attach(model, [make_prefix(model, [2, 2, 2]), None]):
        with pytest.raises(InjectionError, match="prefixes for 2 rows are attached, the batch has 3"):
            model(ids)
        with pytest.raises(InjectionError, match="prefixes for 2 rows are attached, the batch has 4"):
            model(torch.cat([ids[:2], ids[:2]]))
        with pytest.raises(InjectionError, match="prefixes for 2 rows are attached"):
            model.generate(torch.cat([ids[:2], ids[:2]]), max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_prefix_and_text_beyond_the_context_are_refused_with_the_numbers(make_model, make_prefix, make_states, family):
    model = make_model(family)
    with attach(model, make_prefix(model, [5, 5, 5])):
        model(torch.full((1, 59), 7))
        with pytest.raises(InjectionError, match="prefix and text need 65 positions, the base model has 64"):
            model(torch.full((1, 60), 7))


def test_position_ids_of_the_caller_are_respected(make_model, make_prefix, make_states, ids):
    model = make_model("llama")
    prefix = make_prefix(model, [2, 2, 2])
    with attach(model, prefix):
        default = model(ids).logits
        same = model(ids, position_ids=torch.arange(9)[None]).logits
        shifted = model(ids, position_ids=torch.arange(9)[None] * 2).logits
        with pytest.raises(InjectionError, match=r"position_ids: expected shape \[3, 9\]"):
            model(ids, position_ids=torch.arange(9).expand(2, -1))
    assert torch.equal(default, same)
    assert not torch.allclose(default, shifted)


def test_a_prefix_of_another_model_is_refused(make_model, make_prefix, make_states):
    model, other = make_model("llama"), make_model("qwen2")
    states = make_states(model, [2, 2, 2])
    assert fingerprint(model) != fingerprint(other)
    assert fingerprint(model) == fingerprint(make_model("llama", fresh=True))
    prefix = Prefix.from_states(states, base=BaseCard(id="other", fingerprint=fingerprint(other)))
    with pytest.raises(BaseMismatchError, match="this artefact was trained on other"):
        attach(model, prefix)
    with pytest.raises(InjectionError, match="another geometry than this model"):
        attach(make_model("gpt2"), prefix)


def test_a_copied_configuration_does_not_run_without_its_prefix(make_model, make_prefix, make_states, ids):
    model = make_model("llama")
    with attach(model, make_prefix(model, [2, 2, 2])):
        copied = type(model)(model.config)
        with pytest.raises(InjectionError, match="its configuration was copied from a model while a prefix"):
            copied(ids)


def test_changing_the_attention_implementation_under_a_prefix_is_refused(make_model, make_prefix, ids):
    """transformers would call its own attention again, and the prefix would be gone without a word."""
    model = make_model("llama", fresh=True)
    with attach(model, make_prefix(model, [2, 2, 2])):
        model.set_attn_implementation("eager")
        with pytest.raises(InjectionError, match="attention implementation was changed while a prefix was attached"):
            model(ids)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["positive", None],
            r"^expected a Prefix or None per row, got str; Prefix.load\('positive'\) reads one from there$",
        ),
        ([3], r"^expected a Prefix or None per row, got int$"),
        (
            "runs/it",
            r"^expected a Prefix, one per row, a PrefixEncoder or None, got str; Prefix.load\('runs/it'\) reads",
        ),
        (Path("it"), r"^expected a Prefix, .* or None, got PosixPath; Prefix.load\('it'\) reads one from there$"),
        ({}, r"^expected a Prefix, one per row, a PrefixEncoder or None, got dict$"),
    ],
)
def test_what_is_no_prefix_is_refused(given, message):
    with pytest.raises(InjectionError, match=message):
        require_attachable(given)


def test_states_are_no_prefix_yet_and_a_loaded_base_will_do(make_model, make_prefix, tiny_llama_dir, ids):
    base = load_base_model(str(tiny_llama_dir))
    states = text_states(base.model, ids[0])
    message = r"got PrefixStates; Prefix.from_states\(states, base=...\) makes one of them$"
    with pytest.raises(InjectionError, match=message):
        require_attachable(states)
    prefix = Prefix.from_states(states, base=BaseCard(id=base.id, fingerprint=fingerprint(base.model)))
    with attach(base, prefix):
        found = base.model(ids).logits
    with attach(base.model, prefix):
        assert torch.equal(base.model(ids).logits, found)
