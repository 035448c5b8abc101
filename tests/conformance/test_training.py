"""What training adds: low precision, and gradient checkpointing."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from conformance.families import build_model
from conformance.scene import PADDINGS, padding
from conformance.unsupported import REENTRANT
from prefixkit.errors import InjectionError
from prefixkit.injection import attach
from prefixkit.prefix import BaseCard, Prefix, PrefixEncoder, reproduce

#: Rounding errors add up over three layers of a dozen roundings each; sixteen units in the last place cover them.
UNITS = 16
#: Families whose attention layers do not get a forward pass's keyword arguments, and with them its bank.
DROPS_ARGUMENTS = ("stablelm", "nemotron")


@pytest.mark.slow
@pytest.mark.cell("precision")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_low_precision_stays_within_rounding_of_float64(any_family, dtype, cell, make_states, make_ids):
    check_precision(cell, build_model(any_family).to(dtype), padding("left", 3, 6), make_states, make_ids(3, 6))


def check_precision(cell, low, mask, make_states, ids):
    """A model in low precision is within rounding of the same in float64; which it is afterwards."""
    dtype = low.dtype
    seen = torch.ones_like(ids).bool() if mask is None else mask.bool()
    prefix = Prefix.from_states(make_states(low, [3, 0, 2]).map(lambda t: t.to(dtype)), base=BaseCard(id="tiny"))
    with attach(low, [prefix, None, prefix]):
        found = low(input_ids=ids, attention_mask=mask).logits[seen].double()
    exact = low.double()  # the same weights, bit for bit
    same = Prefix.from_states(prefix.states.map(Tensor.double), base=BaseCard(id="tiny"))
    with attach(exact, [same, None, same]):
        expected = exact(input_ids=ids, attention_mask=mask).logits[seen]
    error = (found - expected).norm() / expected.norm()
    cell.exact(float(error) <= UNITS * torch.finfo(dtype).eps, True)


@pytest.mark.slow
@pytest.mark.cell("checkpointing")
@pytest.mark.parametrize("kind", ["non-reentrant", "reentrant"])
def test_checkpointing_gives_the_same_gradients_or_is_refused(
    any_family, kind, cell, make_model, make_states, make_ids
):
    model = make_model(any_family, fresh=True).train()
    states = make_states(model, [3, 0, 2])
    encoder = PrefixEncoder(states.geometry, states.lengths, dtype=torch.float64)
    reproduce(encoder, states)

    def gradients():
        encoder.zero_grad()
        with attach(model, encoder), torch.random.fork_rng():
            torch.manual_seed(7)  # families' own dropout
            model(input_ids=make_ids(2, 6), labels=make_ids(2, 6), use_cache=False).loss.backward()
        return [pair.grad.clone() for pair in encoder.states if pair.grad is not None]

    expected = gradients()
    assert min(float(gradient.abs().max()) for gradient in expected if gradient.numel()) > 1e-9
    if not model.supports_gradient_checkpointing:
        with cell.refused(ValueError, "does not support activation checkpointing"):
            model.activation_checkpointing_enable()
        return
    model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=kind == "reentrant"))
    if kind == "reentrant":
        with cell.refused(InjectionError, REENTRANT):
            gradients()
        return
    if any_family in DROPS_ARGUMENTS:
        with cell.refused(InjectionError, "does not hand keyword arguments down to its attention layers, so a recomp"):
            gradients()
        return
    cell.exact(gradients(), expected)


@pytest.mark.slow
@pytest.mark.cell("checkpointing")
@pytest.mark.parametrize("padded", PADDINGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_checkpointing_of_a_padded_batch(family, attention, padded, cell, make_states, make_ids):
    model, mask = build_model(family, attention).train(), padding(padded, 3, 6)
    states = make_states(model, [3, 0, 2])
    encoder = PrefixEncoder(states.geometry, states.lengths, dtype=torch.float64)
    reproduce(encoder, states)
    labels = make_ids(3, 6) if mask is None else make_ids(3, 6).masked_fill(mask == 0, -100)

    def gradients():
        encoder.zero_grad()
        with attach(model, encoder), torch.random.fork_rng():
            torch.manual_seed(7)
            model(input_ids=make_ids(3, 6), attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        return [pair.grad.clone() for pair in encoder.states if pair.grad is not None]

    expected = gradients()
    assert min(float(gradient.abs().max()) for gradient in expected if gradient.numel()) > 1e-9
    model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
    cell.exact(gradients(), expected)


@pytest.mark.slow
@pytest.mark.cell("precision")
@pytest.mark.parametrize("padded", PADDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_low_precision_of_eager_attention(family, dtype, padded, cell, make_states, make_ids):
    check_precision(cell, build_model(family, "eager").to(dtype), padding(padded, 3, 6), make_states, make_ids(3, 6))
