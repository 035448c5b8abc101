"""Whole models: mixed rows, generation, windows and checkpointing give what each row alone gives."""

from typing import Any

import pytest
import torch
from torch import Tensor

from prefixkit.injection import attach
from prefixkit.prefix import PrefixEncoder, reproduce

EXACT: dict[str, Any] = {"atol": 1e-10, "rtol": 0}


@pytest.fixture
def ids(make_ids):
    return make_ids(3, 9, seed=5)


def padding(ids: Tensor, side: str) -> Tensor:
    mask = torch.ones_like(ids)
    for row in range(1, len(ids)):
        if side == "left":
            mask[row, :row] = 0
        elif side == "right":
            mask[row, -row:] = 0
    return mask


def test_the_prefix_stays_visible_past_the_sliding_window(make_model, make_prefix, make_states, windowed_family, ids):
    model = make_model(windowed_family)
    states = make_states(model, [3, 3, 3]).map(lambda t: t.requires_grad_())
    encoder = PrefixEncoder(states.geometry, states.lengths, dtype=torch.float64)
    reproduce(encoder, states)
    with attach(model, encoder):
        model(ids).logits[:, -1].sum().backward()
    assert all(pair.grad.abs().max() > 1e-8 for pair in encoder.states)


@pytest.mark.usefixtures("all_float64")
def test_a_mixed_batch_equals_each_row_alone(make_model, make_prefix, make_states, family, ids):
    model = make_model(family)
    rows = [make_prefix(model, [4, 0, 2], seed=1, gated=True), None, make_prefix(model, [1, 3, 3], seed=2)]
    with attach(model, rows):
        together = model(ids).logits
    for row, prefix in enumerate(rows):
        with attach(model, prefix):
            torch.testing.assert_close(together[row], model(ids[row : row + 1]).logits[0], **EXACT)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2},
                                     {"cache_implementation": "static"}, {"use_cache": False}], ids=str)  # fmt: skip
@pytest.mark.parametrize(("family", "order"), [("llama", (0, 1, 2)), ("llama", (2, 0, 2)), ("gpt2", (0, 1, 2)),
                                               ("opt", (0, 1, 2)), ("mistral-window", (0, 1, 2))])  # fmt: skip
def test_generation_of_a_mixed_padded_batch_equals_each_row_alone(
    make_model, make_prefix, make_states, family, order, options, ids
):
    model = make_model(family)
    choice = [make_prefix(model, [4, 4, 4], seed=1), None, make_prefix(model, [2, 2, 2], seed=2)]
    rows = [choice[place] for place in order]
    mask = padding(ids, "left")
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
    copies = settings.get("num_return_sequences", 1)
    torch.manual_seed(0)
    with attach(model, rows):
        together = model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    if settings["do_sample"]:  # sampled rows share one stream of dice: compare the text they could have drawn
        assert together.shape == (6, 6)
        return
    for row, prefix in enumerate(rows):
        alone = ids[row : row + 1, mask[row].bool()]
        with attach(model, prefix):
            expected = model.generate(alone, attention_mask=torch.ones_like(alone), **settings)[:, alone.shape[1] :]
        assert torch.equal(together[row * copies : (row + 1) * copies], expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
def test_cached_generation_equals_recomputing_everything(make_model, make_prefix, make_states, family, ids):
    model = make_model(family)
    with attach(model, make_prefix(model, [3, 3, 3])):
        cached = model.generate(ids, max_new_tokens=7, min_new_tokens=7, do_sample=False, pad_token_id=0)
        text = ids
        for step in range(7):
            logits = model(text, use_cache=False).logits[:, -1]
            logits[:, 2] = -torch.inf  # min_new_tokens forbids the end of text
            text = torch.cat([text, logits.argmax(1, keepdim=True)], dim=1)
            assert torch.equal(text[:, -1], cached[:, 9 + step])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_gradient_checkpointing_gives_the_same_gradients(make_model, make_prefix, make_states, family, ids):
    model = make_model(family, fresh=True)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    encoder = PrefixEncoder(make_states(model, [3, 3, 3]).geometry, (3, 0, 3), depth=2, width=8, dtype=torch.float64)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    model.train()
    grads = []
    for on in (False, True):
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})
        encoder.zero_grad()
        with attach(model, encoder):
            model(ids, labels=ids).loss.double().backward()
        grads.append([parameter.grad.clone() for parameter in encoder.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed, **EXACT)
        assert plain.abs().sum() > 0
