"""What training adds: low precision, and gradient checkpointing."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from conformance.families import build_model
from conformance.scene import padding
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
    low = build_model(any_family).to(dtype)
    ids, mask = make_ids(3, 6), padding("left", 3, 6)
    prefix = Prefix.from_states(make_states(low, [3, 0, 2]).map(lambda t: t.to(dtype)), base=BaseCard(id="tiny"))
    with attach(low, [prefix, None, prefix]):
        found = low(input_ids=ids, attention_mask=mask).logits[mask.bool()].double()
    exact = low.double()  # the same weights, bit for bit
    same = Prefix.from_states(prefix.states.map(Tensor.double), base=BaseCard(id="tiny"))
    with attach(exact, [same, None, same]):
        expected = exact(input_ids=ids, attention_mask=mask).logits[mask.bool()]
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
        with cell.refused(InjectionError, "use_reentrant=True gives a prefix wrong gradients or none; enable it with"):
            gradients()
        return
    if any_family in DROPS_ARGUMENTS:
        with cell.refused(InjectionError, "does not hand keyword arguments down to its attention layers, so a recomp"):
            gradients()
        return
    cell.exact(gradients(), expected)
