"""The attention function itself: against a loop anyone can check, and against finite differences."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.injection import attention as module
from prefixkit.injection.slots import Current, Slot, clear, has_slot, place
from prefixkit.prefix import stack

EXACT: dict[str, Any] = {"atol": 1e-10, "rtol": 0}


def slow_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, prefix: Any, scale: float) -> Tensor:
    """Attention with a prefix as one would explain it: one row, one head, one query at a time."""
    b, h, t, d = query.shape
    group = h // key.shape[1]
    out = torch.zeros(b, t, h, d, dtype=query.dtype)
    for row, head, q in itertools.product(range(b), range(h), range(t)):
        g, states = head // group, prefix[row]
        text = [(key[row, g, s], value[row, g, s]) for s in range(key.shape[2]) if allowed[row, q, s]]
        virtual = [] if states is None else [(states.key[g, i], states.value[g, i]) for i in range(states.length)]

        def attend(pairs: list[Any], query: Tensor = query[row, head, q]) -> Tensor:
            shares = torch.softmax(torch.stack([query @ k * scale for k, _ in pairs]), dim=0)
            return sum(share * v for share, (_, v) in zip(shares, pairs, strict=True))  # type: ignore[return-value]

        both = attend(virtual + text)
        gate = 1.0 if states is None or states.gate is None else states.gate[head]
        out[row, q, head] = attend(text) + gate * (both - attend(text))
    return out


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_attention_equals_a_slow_loop(make_model, make_prefix, make_states, window, gated):
    model = make_model("llama", fresh=True)
    dice = torch.Generator().manual_seed(3)
    query = torch.randn(3, 4, 5, 8, generator=dice, dtype=torch.float64)
    key, value = (torch.randn(3, 2, 5, 8, generator=dice, dtype=torch.float64) for _ in range(2))
    distance = torch.arange(5)[:, None] - torch.arange(5)[None]
    allowed = (distance >= 0) & (distance < (window or 9))
    rows = [make_states(model, [3, 0, 1], seed=1, gated=gated), None, make_states(model, [1, 2, 1], seed=2)]
    layer = inspect_layer(model)
    place(layer, Slot(0, True, "sdpa", Current(stack(rows, [3, 0, 2]))))
    mask = allowed.expand(3, 1, 5, 5)
    found, _ = module.attend(layer, query, key, value, mask, scaling=0.3, dropout=0.0)
    sites = [None if row is None else row.sites[0] for row in rows]
    expected = slow_attention(query, key, value, allowed.expand(3, 5, 5), sites, 0.3)
    torch.testing.assert_close(found, expected, **EXACT)


def inspect_layer(model: PreTrainedModel) -> torch.nn.Module:
    """The first attention layer."""
    return model.model.layers[0].self_attn  # type: ignore[union-attr, no-any-return, index]


@pytest.mark.parametrize("gated", [False, True])
def test_attention_with_a_prefix_passes_gradcheck(make_model, make_prefix, make_states, gated):
    model = make_model("llama", fresh=True)
    layer = inspect_layer(model)
    dice = torch.Generator().manual_seed(4)
    states = make_states(model, [2, 2, 2], gated=gated)
    query = torch.randn(1, 4, 3, 8, generator=dice, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, 2, 3, 8, generator=dice, dtype=torch.float64, requires_grad=True) for _ in range(2))
    site = states.sites[0]
    leaves = [site.key.requires_grad_(), site.value.requires_grad_(), *([site.gate.requires_grad_()] if gated else [])]  # type: ignore[union-attr]
    mask = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]

    def run(*_: Tensor) -> Tensor:
        if has_slot(layer):
            clear(layer)
        place(layer, Slot(0, True, "sdpa", Current(stack([states], [2]))))
        return module.attend(layer, query, key, value, mask, scaling=0.35, dropout=0.0)[0]

    assert torch.autograd.gradcheck(run, (query, key, value, *leaves))
