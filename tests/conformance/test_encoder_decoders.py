"""Encoder-decoders: prefixes in encoder self-, decoder self- and cross-attention equal the slow reference."""

import inspect
from functools import cache
from itertools import combinations

import pytest
import torch
from transformers import PreTrainedModel

from conformance.encoder_families import ENCODER_DECODERS, build, source_of
from conformance.pairs import cannot_cache, cannot_generate
from conformance.reference import reading
from prefixkit.config import Placement
from prefixkit.errors import ConfigError, DataError, InjectionError
from prefixkit.injection import attach
from prefixkit.models.inspect import Kind, inspect_model
from prefixkit.models.text_states import text_states
from prefixkit.prefix import BaseCard, Prefix, PrefixEncoder, init_mlp, reproduce

PLACEMENTS = list(Placement)
SUBSETS = [list(chosen) for size in (1, 2, 3) for chosen in combinations(PLACEMENTS, size)]
#: Settings of a plain text of six tokens.
SIX = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@cache
def built(name: str, attention: str = "sdpa") -> PreTrainedModel:
    return build(ENCODER_DECODERS[name], attention=attention)


@pytest.fixture
def model(encoder_decoder) -> PreTrainedModel:
    return built(encoder_decoder)


def random_prefix(make_prefix, model, placements=None, length=3, **kinds):
    lengths = inspect_model(model).geometry.lengths(length, placements=placements)
    return make_prefix(model, list(lengths), **kinds)


def padding(source, rows):
    """A mask for the source whose later rows are shorter; None for features."""
    if "input_ids" not in source:
        return {}
    mask = torch.ones_like(source["input_ids"])
    for row in range(1, rows):
        mask[row, -row:] = 0
    return {"attention_mask": mask}


def test_the_geometry_tells_the_three_attentions_apart(model):
    anatomy = inspect_model(model)
    counts = [sum(site.placement is placement for site in anatomy.geometry.sites) for placement in PLACEMENTS]
    layers = 2 if "num_decoder_layers" in vars(model.config) and model.config.num_decoder_layers == 2 else 3
    assert dict(zip(PLACEMENTS, counts, strict=True)) == {
        Placement.ENCODER_SELF: 2, Placement.DECODER_SELF: layers, Placement.CROSS: layers,
    }  # fmt: skip
    assert anatomy.kind is Kind.ENCODER_DECODER
    assert anatomy.stacks == (model.get_encoder(), model.get_decoder())
    assert not anatomy.geometry.moves_text


@pytest.mark.every_family(placements=list(PLACEMENTS))
@pytest.mark.cell("placements")
@pytest.mark.parametrize("placements", SUBSETS, ids="+".join)
def test_each_placement_alone_and_together(cell, model, placements, make_prefix, make_ids):
    rows = [random_prefix(make_prefix, model, placements, seed=1), None, random_prefix(make_prefix, model, seed=2)]
    source, target = source_of(model, 3), make_ids(3, 4)
    inputs = source | padding(source, 3) | {"decoder_input_ids": target}
    states = [None if row is None else row.states for row in rows]
    with reading(model, states):
        expected = model(**inputs).logits
    plain = model(**inputs).logits
    with attach(model, rows):
        found = model(**inputs).logits
    cell.exact(found, expected)
    assert torch.allclose(plain[1], expected[1], rtol=0, atol=1e-12)
    assert float((plain - expected)[0].abs().max()) > 1e-4
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.every_family(attention="sdpa")
@pytest.mark.cell("gradients")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients(cell, encoder_decoder, attention, all_float64, make_states, make_ids):
    model = built(encoder_decoder, attention)
    source, target = source_of(model, 2), make_ids(2, 4)
    inputs = source | padding(source, 2) | {"decoder_input_ids": target}
    states = make_states(model, 2, grad=True)
    weights = torch.randn(2, 4, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with reading(model, [states]):
        (model(**inputs).logits * weights).sum().backward()
    encoder = PrefixEncoder(states.geometry, states.lengths, dtype=torch.float64)
    reproduce(encoder, states)
    with attach(model, encoder):
        (model(**inputs).logits * weights).sum().backward()
    for pair, site in zip(encoder.states, states.sites, strict=True):
        cell.exact(pair.grad, torch.stack([site.key.grad, site.value.grad]))
        assert float(pair.grad.abs().max()) > 1e-9


def check_rows(cell, model, make_prefix, **options):
    """Each row of a mixed batch is written as the row alone."""
    if cannot_generate(cell, model):
        return
    rows = [random_prefix(make_prefix, model, length=6, seed=4), None, random_prefix(make_prefix, model, seed=5)]
    source = source_of(model, 3)
    settings = SIX | options
    copies = settings.get("num_return_sequences", 1)
    with attach(model, rows):
        together = model.generate(**source, **settings)
    plain = model.generate(**source, **settings)
    assert not torch.equal(plain, together)
    for row, prefix in enumerate(rows):
        with attach(model, prefix):
            alone = model.generate(**{name: value[row : row + 1] for name, value in source.items()}, **settings)
        cell.exact(together[row * copies : (row + 1) * copies, : alone.shape[1]], alone)


@pytest.mark.every_family(copies=1)
@pytest.mark.cell("beams")
@pytest.mark.parametrize("copies", [1, 2])
def test_beams(cell, model, copies, make_prefix):
    check_rows(cell, model, make_prefix, num_beams=3, num_return_sequences=copies)


@pytest.mark.cell("static")
def test_static_cache(cell, model, make_prefix):
    check_rows(cell, model, make_prefix, cache_implementation="static")


@pytest.mark.cell("no-cache")
def test_without_a_cache(cell, model, make_prefix):
    check_rows(cell, model, make_prefix, use_cache=False)


@pytest.mark.cell("mixed")
def test_mixed_rows(cell, model, make_prefix):
    check_rows(cell, model, make_prefix)


@pytest.mark.cell("greedy")
def test_greedy(cell, model, make_prefix):
    if cannot_generate(cell, model):
        return
    prefix = random_prefix(make_prefix, model)
    source = source_of(model, 2)
    with reading(model, [prefix.states]):
        expected = model.generate(**source, **SIX)
    with attach(model, prefix):
        cell.exact(model.generate(**source, **SIX), expected)


@pytest.mark.cell("checkpointing")
def test_checkpointing_runs_the_prefix_encoder_once_per_forward_pass(cell, model, make_states, make_ids):
    states = make_states(model, 2)
    source, target = source_of(model, 2), make_ids(2, 4)
    inputs = source | {"decoder_input_ids": target, "labels": target}
    inputs.pop("decoder_input_ids")
    found, runs = [], []
    for checkpointing in (False, True):
        encoder = PrefixEncoder(states.geometry, states.lengths, depth=2, width=8, dropout=0.3, dtype=torch.float64)
        init_mlp(encoder, torch.Generator().manual_seed(0))
        encoder.last.register_forward_hook(lambda *_: runs.append(1))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        with attach(model, encoder), torch.random.fork_rng():
            torch.manual_seed(7)
            model(**inputs, use_cache=False).loss.backward()
        model.eval()
        found.append([parameter.grad for parameter in encoder.parameters()])
    model.activation_checkpointing_disable()
    assert len(runs) == 2
    cell.exact(*found)
    assert float(found[0][0].abs().max()) > 1e-6


def test_batches_of_another_size_are_refused_and_the_model_is_left_as_it_was(model, make_prefix, make_ids):
    rows = [random_prefix(make_prefix, model), None]
    source = source_of(model, 4)
    before = model(**source_of(model, 2), decoder_input_ids=make_ids(2, 3)).logits
    with attach(model, rows):
        with pytest.raises(InjectionError, match="prefixes for 2 rows are attached, the batch has 4"):
            model(**source, decoder_input_ids=make_ids(4, 3))
        with pytest.raises(InjectionError, match="prefixes for 2 rows are attached, the batch has 4"):
            model.generate(**source, max_new_tokens=2)
        model(**source_of(model, 2), decoder_input_ids=make_ids(2, 3))
    assert torch.equal(model(**source_of(model, 2), decoder_input_ids=make_ids(2, 3)).logits, before)


def test_text_keeps_its_positions(model, make_prefix, make_states):
    prefix = random_prefix(make_prefix, model)
    assert prefix.position_offset == 0
    asked = r"prefix.position_offset: text keeps its positions in an encoder; expected 0, got 3"
    with pytest.raises(ConfigError, match=asked):
        Prefix.from_states(prefix.states, base=BaseCard(id="tiny"), position_offset=3)
    with pytest.raises(ConfigError, match=asked):
        attach(model, PrefixEncoder(prefix.states.geometry, prefix.states.lengths), position_offset=3)


def test_a_prefix_starts_from_the_models_own_states_of_a_text(model, make_ids):
    text = make_ids(4, seed=8)
    if model.main_input_name == "input_features":
        with pytest.raises(DataError, match="reads input_features, no text, so its prefix cannot start from one"):
            text_states(model, text)
        return
    states = text_states(model, text)
    assert states.lengths == (4,) * len(states.geometry.sites)
    if not cannot_cache(model):
        cache = model(input_ids=text[None], decoder_input_ids=text[None], use_cache=True).past_key_values
        caches = {Placement.DECODER_SELF: cache.self_attention_cache, Placement.CROSS: cache.cross_attention_cache}
        for site, own in zip(states.geometry.sites, states.sites, strict=True):
            if site.placement in caches:
                layer = caches[site.placement].layers[site.layer]
                torch.testing.assert_close((own.key, own.value), (layer.keys[0], layer.values[0]), **EXACT)
    first = next(m for m in model.get_encoder().modules() if hasattr(m, "k_proj") or hasattr(m, "k"))
    hidden = model.get_encoder()(input_ids=text[None], output_hidden_states=True).hidden_states[0]
    if hasattr(first, "k_proj") and model.config.model_type in ("bart", "marian"):  # layers that normalise afterwards
        expected = first.k_proj(hidden).view(4, -1, states.sites[0].key.shape[2]).transpose(0, 1)
        torch.testing.assert_close(states.sites[0].key, expected, **EXACT)


@pytest.mark.cell("encoded")
def test_an_encoders_output_goes_with_the_prefix_it_was_computed_under(cell, model, make_prefix, make_ids):
    if cannot_generate(cell, model):
        return
    one, other = (random_prefix(make_prefix, model, seed=seed) for seed in (1, 2))
    decoder_only = random_prefix(make_prefix, model, [Placement.DECODER_SELF])
    source, target = source_of(model, 2), make_ids(2, 4)
    plain = model.get_encoder()(**source)
    refused = "encoder_outputs were computed without the prefix that is attached; compute them inside attach"
    with attach(model, one):
        whole = model(**source, decoder_input_ids=target).logits
        kept = model.get_encoder()(**source)
        cell.exact(model(encoder_outputs=kept, decoder_input_ids=target).logits, whole)
        written = model.generate(**source, max_new_tokens=4, num_beams=2)
        assert torch.equal(model.generate(encoder_outputs=kept, max_new_tokens=4, num_beams=2), written)
        with pytest.raises(InjectionError, match=refused):
            model(encoder_outputs=plain, decoder_input_ids=target)
        with pytest.raises(InjectionError, match=refused):
            model.generate(encoder_outputs=plain, max_new_tokens=4)
    with attach(model, other), pytest.raises(InjectionError, match=refused):
        model(encoder_outputs=kept, decoder_input_ids=target)
    with attach(model, decoder_only):
        model(encoder_outputs=plain, decoder_input_ids=target)  # nothing of it is in the encoder
        model(encoder_outputs=model.get_encoder()(**source), decoder_input_ids=target)
        with pytest.raises(InjectionError, match=refused):
            model(encoder_outputs=kept, decoder_input_ids=target)
        with pytest.raises(InjectionError, match=refused):
            model.generate(encoder_outputs=kept, max_new_tokens=4)


def test_an_encoders_output_of_other_rows_is_refused(model, make_prefix):
    rows = [random_prefix(make_prefix, model, [Placement.DECODER_SELF]), None]
    outputs = model.get_encoder()(**source_of(model, 4))
    with (
        attach(model, rows),
        pytest.raises(InjectionError, match="prefixes for 2 rows are attached, the batch has 4"),
    ):
        model.generate(encoder_outputs=outputs, max_new_tokens=2)


def test_an_encoders_output_given_by_position_is_looked_at_too(model, make_prefix, make_ids):
    names = list(inspect.signature(model.forward).parameters)
    given = {"encoder_outputs": model.get_encoder()(**source_of(model, 2)), "decoder_input_ids": make_ids(2, 4)}
    positional = [given.get(name) for name in names[: 1 + max(map(names.index, given))]]
    with (
        attach(model, random_prefix(make_prefix, model)),
        pytest.raises(InjectionError, match="encoder_outputs were computed without the prefix"),
    ):
        model(*positional)


def test_a_pass_that_was_interrupted_leaves_nothing_behind(model, make_states):
    """torch does not call hooks after a KeyboardInterrupt."""
    states = make_states(model, 2)
    encoder = PrefixEncoder(states.geometry, states.lengths, dtype=torch.float64)
    reproduce(encoder, states)
    source = source_of(model, 2)

    def interrupt(*_):
        raise KeyboardInterrupt

    with attach(model, encoder):
        hook = model.get_decoder().register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**source, decoder_input_ids=torch.tensor([[5, 6], [7, 8]]))
        hook.remove()
        reproduce(encoder, make_states(model, 2, seed=9))
        found = model.get_encoder()(**source)[0]
    with attach(model, encoder):
        assert torch.equal(found, model.get_encoder()(**source)[0])
