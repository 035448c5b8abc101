"""Rows and their prefixes, lengths of zero, and everything a batch can get wrong."""

from dataclasses import replace

import pytest
import torch

from prefixkit.errors import BaseMismatchError, InjectionError
from prefixkit.injection import attach
from prefixkit.models.fingerprint import fingerprint, weights_hash
from prefixkit.prefix import BaseCard, Prefix, PrefixEncoder, SiteStates, init_mlp, reproduce, stack


def test_a_prefix_of_length_zero_equals_the_base_model_bit_for_bit(family, make_model, make_prefix, make_ids):
    model, ids = make_model(family), make_ids(2, 6)
    plain = model(input_ids=ids).logits
    with attach(model, make_prefix(model, 0)):
        assert torch.equal(model(input_ids=ids).logits, plain)
    with attach(model, [make_prefix(model, 0), None]):
        assert torch.equal(model(input_ids=ids).logits, plain)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 1, 0], [2, 0, 2]])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_rows_in_any_order_with_padding_equal_each_row_alone(
    family, attention, side, order, make_model, make_prefix, make_ids
):
    model, ids = make_model(family, attention), make_ids(3, 7)
    choice = [make_prefix(model, [4, 0, 2], seed=1, gated=True), None, make_prefix(model, [1, 5, 3], seed=3)]
    rows = [choice[i] for i in order]
    mask = torch.ones_like(ids)
    for row in range(3):
        if side == "left":
            mask[row, :row] = 0
        elif row:
            mask[row, -row:] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with attach(model, rows):
        together = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for row, prefix in enumerate(rows):
        with attach(model, prefix):
            alone = model(input_ids=ids[row, mask[row].bool()][None]).logits[0]
        # eager attention runs its softmax in float32, and without the padding it sums fewer columns
        exact = 1e-10 if attention == "sdpa" else 1e-5
        torch.testing.assert_close(together[row, mask[row].bool()], alone, rtol=exact, atol=exact)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral-window"])
def test_every_returned_beam_follows_its_own_row(family, make_model, make_prefix, make_ids):
    model, ids = make_model(family), make_ids(2, 5)
    rows = [make_prefix(model, 4, seed=1, gated=True), make_prefix(model, 2, seed=2)]
    settings = {"num_beams": 3, "num_return_sequences": 3, "do_sample": False, "max_new_tokens": 5,
                "min_new_tokens": 5}  # fmt: skip
    with attach(model, rows):
        together = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    for row, prefix in enumerate(rows):
        with attach(model, prefix):
            alone = model.generate(ids[row][None], attention_mask=torch.ones(1, 5), **settings)
        assert torch.equal(together[3 * row : 3 * row + 3], alone)


@pytest.mark.parametrize("rows", [1, 3])
def test_generate_refuses_another_number_of_rows_with_both_numbers(rows, make_model, make_prefix, make_ids):
    model, ids = make_model("llama"), make_ids(2, 5)
    message = f"prefixes for {rows} rows are attached, the batch has 2; attach one prefix"
    with attach(model, [make_prefix(model, 2)] * rows):
        for call in ({"inputs": ids}, {"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
            with pytest.raises(InjectionError, match=message):
                model.generate(**call, max_new_tokens=2)


def test_a_failed_generate_does_not_let_a_plain_forward_repeat_rows(make_model, make_prefix, make_ids):
    model = make_model("llama")
    with attach(model, [make_prefix(model, 2), None]):
        with pytest.raises(ValueError, match="unknown_option"):
            model.generate(make_ids(2, 5), unknown_option=1)
        with pytest.raises(InjectionError, match="the batch has 4"):
            model(input_ids=make_ids(4, 5))


def test_an_instances_own_generate_comes_back(make_model, make_prefix):
    model = make_model("llama", fresh=True)
    own = model.generate = lambda *_, **__: "mine"
    with attach(model, [make_prefix(model, 2)]):
        assert model.generate is not own
    assert model.generate is own


def test_generating_past_the_context_is_refused_with_the_numbers(make_model, make_prefix, make_ids):
    model, ids = make_model("llama"), make_ids(1, 58)
    with (
        attach(model, make_prefix(model, 5)),
        pytest.raises(InjectionError, match="prefix and text need 65 positions, the base model has 64; shorten"),
    ):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, min_new_tokens=9)


def test_the_position_offset_of_prefix_and_encoder_is_used(make_model, make_prefix, make_states, make_ids):
    model, ids = make_model("llama"), make_ids(2, 5)
    states = make_states(model, [2, 3, 0])
    encoder = PrefixEncoder(states.geometry, states.lengths, dtype=torch.float64)
    reproduce(encoder, states)
    found = {}
    for offset in (0, 3, 7):
        with attach(model, make_prefix(model, [2, 3, 0], offset=offset)):
            found[offset] = model(input_ids=ids).logits
        with attach(model, encoder, position_offset=offset):
            assert torch.equal(model(input_ids=ids).logits, found[offset])
    with attach(model, encoder):
        assert torch.equal(model(input_ids=ids).logits, found[3])
    assert float((found[0] - found[7]).abs().max()) > 1e-3


def test_what_does_not_fit_is_refused_and_nothing_is_changed(make_model, make_prefix, make_states):
    model, other = make_model("llama"), make_model("gpt2")
    foreign = PrefixEncoder(make_states(other, 2).geometry, (2, 2, 2))
    with torch.inference_mode():
        frozen = PrefixEncoder(make_states(model, 2).geometry, (2, 2, 2))
    cases = [
        ((model, frozen), {}, "made under torch.inference_mode.., so no gradient reaches it; make it outside"),
        ((model, foreign), {}, "the encoder was made for a model of another geometry"),
        ((model, []), {}, "no rows: give one prefix"),
        ((model, [make_prefix(model, 2)]), {"position_offset": 1}, "a saved prefix brings its own; give it for an enc"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(InjectionError, match=message):
            attach(*arguments, **options)
        assert model.config._attn_implementation == "sdpa"


def test_a_layer_called_on_its_own_is_refused(make_model, make_prefix):
    model = make_model("llama")
    hidden = torch.zeros(1, 2, 32, dtype=torch.float64)
    rotary = model.model.rotary_emb(hidden, torch.arange(2)[None])
    with attach(model, make_prefix(model, 2)), pytest.raises(InjectionError, match="called on its own; call the whole"):
        model.model.layers[0].self_attn(hidden, position_embeddings=rotary, attention_mask=None)


def test_a_neutral_start_is_the_base_model_and_its_gates_learn(family, make_model, make_states, make_ids):
    model, ids = make_model(family), make_ids(2, 6)
    states = make_states(model, 3)
    encoder = PrefixEncoder(states.geometry, states.lengths, depth=2, width=8, gated=True, dtype=torch.float64)
    init_mlp(encoder, torch.Generator().manual_seed(0))
    reproduce(encoder, states)
    positions = torch.arange(3, 9)[None]
    plain = model(input_ids=ids, position_ids=positions).logits
    with attach(model, encoder, position_offset=0):
        logits = model(input_ids=ids, position_ids=positions).logits
        logits.square().sum().backward()
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-12)
    assert all(float(gate.grad.abs().min()) > 1e-9 for gate in encoder.gates)


def test_prefixes_of_different_models_cannot_share_a_bank(make_model, make_states):
    with pytest.raises(InjectionError, match="different geometry cannot share a batch"):
        stack([make_states(make_model("llama"), 2), make_states(make_model("gpt2"), 2)], [2, 2])
    with pytest.raises(InjectionError, match="a bank needs at least one prefix"):
        stack([None], [0])


def test_states_of_another_shape_are_refused_by_site(make_model, make_states):
    states = make_states(make_model("llama"), 2)
    first, key = states.sites[0], states.sites[0].key
    for site, message in [
        (SiteStates(key[:1], first.value[:1]), r"decoder_self.0.key: expected shape \[2, 2, 8\], got \[1, 2, 8\]"),
        (SiteStates(key, first.value, torch.ones(3)), r"decoder_self.0.gate: expected shape \[4\], got \[3\]"),
    ]:
        with pytest.raises(InjectionError, match=message):
            replace(states, sites=(site, *states.sites[1:]))
    with pytest.raises(InjectionError, match="prefix states for 2 sites do not fit a geometry of 3"):
        replace(states, sites=states.sites[:2])


def test_the_fingerprint_knows_weights_and_settings_but_not_the_dtype(make_model, make_states):
    model = make_model("llama", fresh=True).float()
    same = make_model("llama", fresh=True).float().bfloat16()
    assert fingerprint(model) == fingerprint(same)
    assert weights_hash(model) != weights_hash(same)
    turned = make_model("llama", rms_norm_eps=1e-3).float()
    changed = make_model("llama", fresh=True).float()
    with torch.no_grad():
        changed.model.norm.weight[0] += 1
    for other in (turned, changed):
        prefix = Prefix.from_states(make_states(model, 2), base=BaseCard(id="llama", fingerprint=fingerprint(model)))
        with pytest.raises(BaseMismatchError, match=r"trained on llama \(fingerprint .*\); load that base model"):
            attach(other, prefix)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_mask_for_all_rows_serves_prefixes_of_different_lengths(attention, make_model, make_prefix, make_ids):
    model, ids = make_model("llama", attention), make_ids(3, 5)
    rows = [make_prefix(model, [4, 1, 2], seed=1), None, make_prefix(model, 2, seed=3)]
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]  # [1, 1, t, s]
    if attention == "eager":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float32).min)
    with attach(model, rows):
        expected = model(input_ids=ids).logits
        found = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
