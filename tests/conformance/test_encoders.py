"""Bidirectional encoders: a prefix in every self-attention equals the slow reference, gradients included."""

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from conformance.encoder_families import ENCODERS, build
from conformance.precision import KeepFloat64
from conformance.reference import reading
from prefixkit.config import Placement
from prefixkit.injection import attach
from prefixkit.models.inspect import Kind, inspect_model
from prefixkit.prefix import PrefixEncoder, reproduce

HEADS = {"bare": AutoModel, "sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}


def padded(ids):
    mask = torch.ones_like(ids)
    for row in range(1, len(ids)):
        mask[row, -row:] = 0
    return mask


def read(model, ids, mask=None):
    out = model(input_ids=ids, attention_mask=mask)
    return out.last_hidden_state if "last_hidden_state" in out else out.logits


@pytest.mark.parametrize("head", HEADS)
def test_an_encoder_has_one_stack_that_sees_both_ways(encoder, head):
    anatomy = inspect_model(build(ENCODERS[encoder], HEADS[head]))
    assert anatomy.kind is Kind.ENCODER
    assert [(site.placement, site.layer) for site in anatomy.geometry.sites] == [
        (Placement.ENCODER_SELF, layer) for layer in range(3)
    ]


@pytest.mark.cell("mixed")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_mixed_rows(cell, encoder, head, masked, make_prefix, make_ids):
    model = build(ENCODERS[encoder], HEADS[head])
    rows = [make_prefix(model, [3, 0, 2], seed=1), None, make_prefix(model, 4, seed=2)]
    ids = make_ids(3, 7)
    mask = padded(ids) if masked else None
    with reading(model, [row and row.states for row in rows]):
        expected = read(model, ids, mask)
    plain = read(model, ids, mask)
    with attach(model, rows):
        cell.exact(read(model, ids, mask), expected)
    assert float((plain - expected)[0].abs().max()) > 1e-4
    assert torch.equal(read(model, ids, mask), plain)


@pytest.mark.cell("gradients")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients(cell, encoder, attention, checkpointing, make_states, make_ids):
    model = build(ENCODERS[encoder], AutoModelForSequenceClassification, attention)
    ids = make_ids(3, 7)
    states = make_states(model, 3, grad=True)
    weights = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    recomputes = checkpointing and encoder == "modernbert"  # in float32, as a backward pass knows no mode
    precision, within = (nullcontext(), 1e-5) if recomputes else (KeepFloat64(), 1e-10)
    with precision, reading(model, [states]):
        (read(model, ids, padded(ids)) * weights).sum().backward()
    encoder = PrefixEncoder(states.geometry, states.lengths, dtype=torch.float64)
    reproduce(encoder, states)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    with precision, attach(model, encoder):
        (read(model, ids, padded(ids)) * weights).sum().backward()
    for pair, site in zip(encoder.states, states.sites, strict=True):
        cell.exact(pair.grad, torch.stack([site.key.grad, site.value.grad]), within)
        assert float(pair.grad.abs().max()) > 1e-9


def test_in_an_encoder_the_window_never_hides_the_prefix(make_prefix, make_ids):
    model = build(ENCODERS["modernbert"], AutoModel)
    lengths = [0 if site.layer == 0 else 2 for site in inspect_model(model).geometry.sites]
    ids = make_ids(1, 30)
    plain = read(model, ids)
    with attach(model, make_prefix(model, lengths)):
        assert float((read(model, ids) - plain).abs().amax(dim=2).min()) > 1e-4


@pytest.mark.slow
@pytest.mark.cell("compiled-forward")
def test_one_compiled_model_follows_what_is_attached(core_encoder, cell, unchecked, make_prefix, make_ids):
    model, ids = build(ENCODERS[core_encoder], AutoModel), make_ids(2, 7)
    one, other = make_prefix(model, [3, 0, 2], seed=1), make_prefix(model, 4, seed=2)
    cases = [None, one, other, [other, None], None, one]
    expected = []
    for prefix in cases:
        with attach(model, prefix):
            expected.append(read(model, ids, padded(ids)))
    assert not torch.allclose(expected[1], expected[2])
    compiled = torch.compile(model, backend="eager")  # all but the code generator
    for prefix, states in zip(cases, expected, strict=True):
        with attach(model, prefix):
            cell.exact(read(compiled, ids, padded(ids)), states, within=1e-5)
