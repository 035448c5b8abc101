"""What is told of a layer's attention equals a loop over rows, heads and queries, and changes nothing."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModel, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from conformance.encoder_families import ENCODER_DECODERS, ENCODERS, build, source_of
from conformance.families import FAMILIES
from conformance.precision import KeepFloat64
from prefixkit.compat import layer_windows
from prefixkit.config import Placement
from prefixkit.injection import attach
from prefixkit.injection.attention import NAMES, attend
from prefixkit.injection.recording import Reading, recording
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import SiteStates

#: More virtual tokens than a value has numbers in one layer, none in another.
LENGTHS = [3, 0, 18]
TOKENS = 6


@contextmanager
def asked(calls: list[tuple[Tensor, Tensor, Tensor, dict[str, Any]]]) -> Iterator[None]:
    """Collect what the layers ask with: query, key and value of the text, options."""

    def ask(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
        calls.append((query, key, value, options))
        return attend(module, query, key, value, attention_mask, **options)

    for name in NAMES.values():
        AttentionInterface.register(name, ask)
    try:
        yield
    finally:
        for name in NAMES.values():
            AttentionInterface.register(name, attend)


def slow_share(query: Tensor, keys: Tensor, states: SiteStates | None, g: int, head: int, options: Any,
               distances: Tensor | None = None) -> Tensor:  # fmt: skip
    """One row, one head, one query: the weights on the virtual tokens; text is at distances that T5 rates."""
    if states is None:
        return torch.zeros(0, dtype=torch.float64)
    scale = query.shape[0] ** -0.5 if options.get("scaling") is None else options["scaling"]
    scores = [float(query.double() @ key.double()) * scale for key in (*states.key[g], *keys)]
    if distances is not None:
        scores[states.length :] = [s + float(d) for s, d in zip(scores[states.length :], distances, strict=True)]
    if options.get("softcap") is not None:
        scores = [options["softcap"] * math.tanh(s / options["softcap"]) for s in scores]
    weights = (torch.tensor(scores, dtype=torch.float64) - max(scores)).exp()
    if options.get("s_aux") is not None:  # a sink: it takes its part and gives nothing
        weights = torch.cat([weights, (options["s_aux"][head].double().reshape(1) - max(scores)).exp()])
    gate = 1.0 if states.gate is None else float(states.gate[head])
    return gate * weights[: states.length] / weights.sum()


def read(model: PreTrainedModel, prefix: Any, **inputs: Tensor) -> tuple[list[Reading], list[Any], Tensor]:
    """One forward pass recorded, and what its layers asked with in another one."""
    calls: list[Any] = []
    readings: list[Reading] = []
    with torch.no_grad(), attach(model, prefix):
        with asked(calls):
            model(**inputs)
        with recording(inspect_model(model).attention, readings.append):
            output = model(**inputs)[0]
    return readings, calls, output


def check(model: PreTrainedModel, rows: list[Any], readings: list[Reading], calls: list[Any], mask: Tensor,
          tolerance: float, windows: list[int | None]) -> None:  # fmt: skip
    for reading in readings:
        query, key, value, options = calls[reading.site]
        group = query.shape[1] // key.shape[1]
        for b, h, t in itertools.product(range(len(rows)), range(query.shape[1]), range(query.shape[2])):
            if not mask[b, t]:
                continue  # padding: nobody reads what it attends to
            window = windows[reading.site] or TOKENS
            chunk = getattr(model.config, "attention_chunk_size", None) and windows[reading.site]
            first = t // chunk * chunk if chunk else t - window + 1
            seen = [s for s in range(max(0, first), t + 1) if mask[b, s]]
            assert reading.visible[b, t] == len(seen)
            states = None if rows[b] is None else rows[b].states.sites[reading.site]
            expected = slow_share(query[b, h, t], key[b, h // group][seen], states, h // group, h, options)
            found = reading.shares[b, h, t].double()
            torch.testing.assert_close(found[: len(expected)], expected, atol=tolerance, rtol=0)
            assert (found[len(expected) :] == 0).all()
            if h == 0:
                for norms, states in ((reading.key_norms, key), (reading.value_norms, value)):
                    lengths = [float(one.double().norm()) for one in states[b, :, t]]
                    assert float(norms[b, t]) == pytest.approx(sum(lengths) / len(lengths), abs=1e-6)


@pytest.mark.every_family
@pytest.mark.parametrize("gated", [False, True])
def test_shares_equal_a_slow_loop_in_every_family(make_model, make_prefix, make_ids, any_family, gated):
    for attention in FAMILIES[any_family].attentions:
        model = make_model(any_family, attention)
        prefix = make_prefix(model, LENGTHS, gated=gated)
        ids, mask = make_ids(2, TOKENS), torch.ones(2, TOKENS, dtype=torch.long)
        mask[1, 3:] = 0
        with KeepFloat64():
            readings, calls, logits = read(model, prefix, input_ids=ids, attention_mask=mask)
            assert [reading.site for reading in readings] == [0, 2]
            check(model, [prefix, prefix], readings, calls, mask, 1e-10, layer_windows(model.config))
            with torch.no_grad(), attach(model, prefix):
                assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, logits)


def check_stacks(model: PreTrainedModel, prefix: Any, readings: list[Reading], calls: list[Any], source: Tensor | None,
                 tolerance: float) -> None:  # fmt: skip
    """Encoder self-, decoder self- and cross-attention; `source` masks what the encoder reads."""
    sites = prefix.states.geometry.sites
    assert [reading.site for reading in readings] == [
        i for i, states in enumerate(prefix.states.sites) if states.length
    ]
    for reading in readings:
        (query, key, value, options), site = calls[reading.site], sites[reading.site]
        group, distances = query.shape[1] // key.shape[1], options.get("position_bias")
        is_causal, window = site.placement is Placement.DECODER_SELF, options.get("sliding_window")
        for b, h, t in itertools.product(*map(range, query.shape[:3])):
            seen = list(range(t + 1 if is_causal else key.shape[2]))
            if source is not None and not is_causal:
                seen = [s for s in seen if source[b, s]]
            if window is not None:  # ModernBERT's, to both sides
                seen = [s for s in seen if abs(s - t) <= model.config.local_attention // 2]
            if site.placement is Placement.ENCODER_SELF and source is not None and not source[b, t]:
                continue  # padding: nobody reads what it attends to
            assert reading.visible[b, t] == len(seen)
            states, text = prefix.states.sites[reading.site], key[b, h // group][seen]
            apart = None if distances is None else distances[0, h, t, seen]
            expected = slow_share(query[b, h, t], text, states, h // group, h, options, apart)
            torch.testing.assert_close(reading.shares[b, h, t].double(), expected, atol=tolerance, rtol=0)
        for norms, states in ((reading.key_norms, key), (reading.value_norms, value)):
            torch.testing.assert_close(norms.double(), states.double().norm(dim=3).mean(1), atol=1e-6, rtol=0)


def check_family(model: PreTrainedModel, prefix: Any, inputs: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    mask = inputs.get("attention_mask")
    readings, calls, output = read(model, prefix, **inputs)
    check_stacks(model, prefix, readings, calls, mask, tolerance)
    with torch.no_grad(), attach(model, prefix):
        assert torch.equal(model(**inputs)[0], output)


def padded(source: dict[str, Tensor]) -> dict[str, Tensor]:
    """The second row is shorter; what Whisper hears has one length only."""
    if "input_ids" not in source:
        return source
    mask = torch.ones_like(source["input_ids"])
    mask[1, -2:] = 0
    return source | {"attention_mask": mask}


@pytest.mark.every_family
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_all_attentions_of_an_encoder_decoder_are_told(encoder_decoder, attention, gated, make_prefix, make_ids):
    model = build(ENCODER_DECODERS[encoder_decoder], attention=attention)
    lengths = [LENGTHS[site.layer] for site in inspect_model(model).geometry.sites]
    prefix = make_prefix(model, lengths, gated=gated)
    inputs = padded(source_of(model, 2)) | {"decoder_input_ids": make_ids(2, 4)}
    with KeepFloat64():
        check_family(model, prefix, inputs)


@pytest.mark.every_family
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_all_layers_of_an_encoder_are_told(encoder, attention, gated, make_prefix, make_ids):
    model = build(ENCODERS[encoder], AutoModel, attention)
    prefix = make_prefix(model, [3, 18, 0], gated=gated)  # the second layer of ModernBERT has a window
    with KeepFloat64():
        check_family(model, prefix, padded({"input_ids": make_ids(2, TOKENS + 2)}))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_bfloat16_encoder_decoder_is_told_in_float32(attention, make_prefix, make_ids):
    model = build(ENCODER_DECODERS["t5"], attention=attention).bfloat16()
    prefix = make_prefix(model, 4)
    object.__setattr__(prefix, "states", prefix.states.map(lambda tensor: tensor.bfloat16().double()))
    inputs = padded(source_of(model, 2)) | {"decoder_input_ids": make_ids(2, 4)}
    check_family(model, prefix, inputs, 1e-6)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 2, 1, 0)])  # each once; several rows with the same prefix
def test_each_row_is_told_of_its_own_prefix(order, make_model, make_prefix, make_ids):
    model = make_model("llama")
    distinct = [make_prefix(model, [2, 1, 4]), None, make_prefix(model, [5, 3, 1], seed=7, gated=True)]
    rows = [distinct[place] for place in order]
    mask = torch.ones(len(rows), TOKENS, dtype=torch.long)
    readings, calls, _ = read(model, rows, input_ids=make_ids(len(rows), TOKENS), attention_mask=mask)
    assert [reading.shares.shape[3] for reading in readings] == [5, 3, 4]
    check(model, rows, readings, calls, mask, 1e-10, [None] * 3)


def test_a_bfloat16_model_is_told_in_float32(make_model, make_prefix, make_ids):
    model = make_model("llama", fresh=True).bfloat16()
    prefix = make_prefix(model, 4)
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    readings, calls, _ = read(model, prefix, input_ids=make_ids(1, TOKENS), attention_mask=mask)
    rounded = make_prefix(model, 4)
    object.__setattr__(rounded, "states", prefix.states.map(lambda tensor: tensor.bfloat16()))
    check(model, [rounded], readings, calls, mask, 1e-6, [None] * 3)


def test_two_models_are_watched_at_once_and_the_registry_is_restored(make_model, make_prefix, make_ids):
    models = [make_model("llama", fresh=True), make_model("gpt2", fresh=True)]
    told: list[list[Reading]] = [[], []]
    layers = [inspect_model(model).attention for model in models]
    ids = make_ids(1, 3)
    with attach(models[0], make_prefix(models[0], 2)), attach(models[1], make_prefix(models[1], 3)):
        with recording(layers[0], told[0].append):
            with recording(layers[1], told[1].append):
                models[1](input_ids=ids)
            models[0](input_ids=ids)
        models[0](input_ids=ids)
    assert [[reading.shares.shape[3] for reading in each] for each in told] == [[2] * 3, [3] * 3]
    assert all(ALL_ATTENTION_FUNCTIONS[name] is attend for name in NAMES.values())
