"""Gradient checkpointing recomputes layers in the backward pass; the prefix they read must be their own."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointError

from prefixkit.errors import InjectionError
from prefixkit.injection import attach
from prefixkit.prefix import PrefixEncoder, init_mlp, reproduce


@pytest.fixture
def training_model(make_model):
    """A model in training mode, its checkpointing switched on or off by the second argument."""

    def make(name, checkpointing, reentrant=False, **options):
        model = make_model(name, fresh=True, **options)
        if checkpointing:
            model._set_gradient_checkpointing(True, partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant))
        return model.train()

    return make


def make_encoder(model, make_states, *, depth=2, dropout=0.0, gated=True, length=3):
    states = make_states(model, length)
    encoder = PrefixEncoder(
        states.geometry, states.lengths, depth=depth, width=8, dropout=dropout, gated=gated, dtype=torch.float64
    )
    dice = torch.Generator().manual_seed(0)
    init_mlp(encoder, dice)
    reproduce(encoder, states)
    with torch.no_grad():
        for gate in encoder.gates or ():
            gate.copy_(torch.rand(gate.shape, generator=dice))
    return encoder


def gradients(encoder):
    return [parameter.grad.clone() for parameter in encoder.parameters()]


def test_checkpointing_changes_no_gradient(family, training_model, make_states, make_ids):
    found = []
    for checkpointing in (False, True):
        model = training_model(family, checkpointing)
        encoder = make_encoder(model, make_states, dropout=0.3)
        with attach(model, encoder), torch.random.fork_rng():
            torch.manual_seed(7)
            model(input_ids=make_ids(2, 6), labels=make_ids(2, 6), use_cache=False).loss.backward()
        found.append(gradients(encoder))
    assert max(float(gradient.abs().max()) for gradient in found[0]) > 1e-6
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_two_forwards_before_one_backward_keep_their_own_dropout(family, training_model, make_states, make_ids):
    found = []
    for checkpointing in (False, True):
        model = training_model(family, checkpointing)
        encoder = make_encoder(model, make_states, dropout=0.5)
        with attach(model, encoder), torch.random.fork_rng():
            torch.manual_seed(7)
            losses = [
                model(input_ids=make_ids(2, 6, seed=s), labels=make_ids(2, 6, seed=s), use_cache=False).loss
                for s in (0, 1)
            ]
            sum(losses).backward()
        found.append(gradients(encoder))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_another_prefix_attached_before_the_backward_pass_changes_nothing(training_model, make_states, make_ids):
    model = training_model("llama", True)
    encoder, other = make_encoder(model, make_states), make_encoder(model, make_states, depth=0)
    with attach(model, encoder):
        model(input_ids=make_ids(2, 6), labels=make_ids(2, 6)).loss.backward()
    expected = gradients(encoder)
    encoder.zero_grad()
    with attach(model, encoder):
        loss = model(input_ids=make_ids(2, 6), labels=make_ids(2, 6)).loss
    with attach(model, other):
        loss.backward()
    assert all(torch.equal(one, two) for one, two in zip(gradients(encoder), expected, strict=True))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_detaching_before_a_checkpointed_backward_pass_is_an_error(
    attention, gated, training_model, make_states, make_ids
):
    model = training_model("llama", True, attention=attention)
    with attach(model, make_encoder(model, make_states, gated=gated)):
        loss = model(input_ids=make_ids(2, 6), labels=make_ids(2, 6)).loss
    with pytest.raises(CheckpointError):
        loss.backward()


def test_detaching_before_a_plain_backward_pass_is_harmless(training_model, make_states, make_ids):
    model = training_model("llama", False)
    encoder = make_encoder(model, make_states)
    with attach(model, encoder):
        model(input_ids=make_ids(2, 6), labels=make_ids(2, 6)).loss.backward()
        expected = gradients(encoder)
        encoder.zero_grad()
        loss = model(input_ids=make_ids(2, 6), labels=make_ids(2, 6)).loss
    loss.backward()
    assert all(torch.equal(one, two) for one, two in zip(gradients(encoder), expected, strict=True))


@pytest.mark.parametrize("depth", [0, 2])
def test_reentrant_checkpointing_is_refused(depth, training_model, make_states, make_ids):
    model = training_model("llama", True, reentrant=True)
    with (
        attach(model, make_encoder(model, make_states, depth=depth)),
        pytest.raises(
            InjectionError, match=r"use_reentrant=True gives a prefix wrong gradients or none; enable it with"
        ),
    ):
        model(input_ids=make_ids(2, 6))


def test_reentrant_checkpointing_does_not_matter_without_gradients(training_model, make_states, make_ids):
    model = training_model("llama", True, reentrant=True)
    with attach(model, make_encoder(model, make_states)) as _, torch.no_grad():
        trained = model(input_ids=make_ids(2, 6), use_cache=False).logits
        assert torch.equal(trained, model.eval()(input_ids=make_ids(2, 6), use_cache=False).logits)


def test_rows_with_their_own_prefixes_checkpoint_too(training_model, make_prefix, make_ids):
    found = []
    for checkpointing in (False, True):
        model = training_model("llama", checkpointing)
        embeds = model.get_input_embeddings()(make_ids(2, 6)).requires_grad_()
        with attach(model, [make_prefix(model, 3), None]):
            model(inputs_embeds=embeds, use_cache=False).logits.square().sum().backward()
        found.append(embeds.grad)
    assert torch.equal(*found)


def test_a_model_that_loses_the_bank_is_refused_in_the_backward_pass(
    training_model, make_states, make_ids, monkeypatch
):
    model = training_model("llama", True)
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        monkeypatch.setattr(
            layer.self_attn, "forward",
            lambda *a, forward=forward, **k: forward(*a, **{n: v for n, v in k.items() if n != "prefixkit_bank"}),
        )  # fmt: skip
    with attach(model, make_encoder(model, make_states)):
        loss = model(input_ids=make_ids(2, 6), labels=make_ids(2, 6)).loss
        with pytest.raises(InjectionError, match="a recomputed layer cannot know its prefix; switch gradient"):
            loss.backward()
