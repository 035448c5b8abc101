"""What is told of a layer's attention equals a loop over rows, heads and queries, and changes nothing."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from conformance.families import FAMILIES
from conformance.precision import KeepFloat64
from prefixkit.compat import layer_windows
from prefixkit.injection import attach
from prefixkit.injection.attention import NAMES, attend
from prefixkit.injection.recording import Reading, recording
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import SiteStates

#: More virtual tokens than a value has numbers in one layer, none in another.
LENGTHS = [3, 0, 18]
TOKENS = 6


@contextmanager
def asked(calls: list[tuple[Tensor, Tensor, dict[str, Any]]]) -> Iterator[None]:
    """Collect what the layers ask with: query, key of the text, options."""

    def ask(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
        calls.append((query, key, options))
        return attend(module, query, key, value, attention_mask, **options)

    for name in NAMES.values():
        AttentionInterface.register(name, ask)
    try:
        yield
    finally:
        for name in NAMES.values():
            AttentionInterface.register(name, attend)


def slow_share(query: Tensor, keys: Tensor, states: SiteStates | None, g: int, head: int, options: Any) -> Tensor:
    """One row, one head, one query: the weights on the virtual tokens."""
    if states is None:
        return torch.zeros(0, dtype=torch.float64)
    scale = query.shape[0] ** -0.5 if options.get("scaling") is None else options["scaling"]
    scores = [float(query.double() @ key.double()) * scale for key in (*states.key[g], *keys)]
    if options.get("softcap") is not None:
        scores = [options["softcap"] * math.tanh(s / options["softcap"]) for s in scores]
    weights = (torch.tensor(scores, dtype=torch.float64) - max(scores)).exp()
    if options.get("s_aux") is not None:  # a sink: it takes its part and gives nothing
        weights = torch.cat([weights, (options["s_aux"][head].double().reshape(1) - max(scores)).exp()])
    gate = 1.0 if states.gate is None else float(states.gate[head])
    return gate * weights[: states.length] / weights.sum()


def read(model: PreTrainedModel, prefix: Any, ids: Tensor, mask: Tensor) -> tuple[list[Reading], list[Any], Tensor]:
    """One forward pass recorded, and what its layers asked with in another one."""
    calls: list[Any] = []
    readings: list[Reading] = []
    with torch.no_grad(), attach(model, prefix):
        with asked(calls):
            model(input_ids=ids, attention_mask=mask)
        with recording(inspect_model(model).attention, readings.append):
            logits = model(input_ids=ids, attention_mask=mask).logits
    return readings, calls, logits


def check(model: PreTrainedModel, rows: list[Any], readings: list[Reading], calls: list[Any], mask: Tensor,
          tolerance: float, windows: list[int | None]) -> None:  # fmt: skip
    for reading in readings:
        query, key, options = calls[reading.site]
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
                lengths = [float(k.double().norm()) for k in key[b, :, t]]
                assert float(reading.key_norms[b, t]) == pytest.approx(sum(lengths) / len(lengths), abs=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_shares_equal_a_slow_loop_in_every_family(make_model, make_prefix, make_ids, any_family, gated):
    for attention in FAMILIES[any_family].attentions:
        model = make_model(any_family, attention)
        prefix = make_prefix(model, LENGTHS, gated=gated)
        ids, mask = make_ids(2, TOKENS), torch.ones(2, TOKENS, dtype=torch.long)
        mask[1, 3:] = 0
        with KeepFloat64():
            readings, calls, logits = read(model, prefix, ids, mask)
            assert [reading.site for reading in readings] == [0, 2]
            check(model, [prefix, prefix], readings, calls, mask, 1e-10, layer_windows(model.config))
            with torch.no_grad(), attach(model, prefix):
                assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, logits)


def test_each_row_is_told_of_its_own_prefix(make_model, make_prefix, make_ids):
    model = make_model("llama")
    rows = [make_prefix(model, [2, 1, 4]), None, make_prefix(model, [5, 3, 1], seed=7, gated=True)]
    mask = torch.ones(3, TOKENS, dtype=torch.long)
    readings, calls, _ = read(model, rows, make_ids(3, TOKENS), mask)
    assert [reading.shares.shape[3] for reading in readings] == [5, 3, 4]
    check(model, rows, readings, calls, mask, 1e-10, [None] * 3)


def test_a_bfloat16_model_is_told_in_float32(make_model, make_prefix, make_ids):
    model = make_model("llama", fresh=True).bfloat16()
    prefix = make_prefix(model, 4)
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    readings, calls, _ = read(model, prefix, make_ids(1, TOKENS), mask)
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
