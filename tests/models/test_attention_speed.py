"""Timing attention: what is computed is a training step's, and the model is left as it was."""

from typing import Any

import pytest
import torch
from transformers import AutoModel

from conformance.encoder_families import ENCODER_DECODERS, ENCODERS
from conformance.encoder_families import build as build_encoder
from conformance.families import FAMILIES, build_model
from prefixkit.models import attention_speed as module
from prefixkit.models.attention_speed import attention_seconds

ROWS, TOKENS, VIRTUAL = 3, 5, 2


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.core])
def test_every_implementation_a_family_has_is_timed(name: str) -> None:
    model = build_model(name)
    before = model.config._attn_implementation
    seconds = attention_seconds(model, rows=ROWS, tokens=TOKENS, virtual_tokens=VIRTUAL)
    assert set(FAMILIES[name].attentions) <= set(seconds) <= {"sdpa", "eager"}
    assert all(taken > 0 for taken in seconds.values())
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_are_timed_in_their_encoder(name: str) -> None:
    model = build_encoder(ENCODER_DECODERS[name])
    assert set(attention_seconds(model, rows=ROWS, tokens=TOKENS, virtual_tokens=VIRTUAL)) == {"sdpa", "eager"}


def test_encoders_are_timed() -> None:
    model = build_encoder(ENCODERS["bert"], AutoModel)
    assert set(attention_seconds(model, rows=ROWS, tokens=TOKENS, virtual_tokens=VIRTUAL)) == {"sdpa", "eager"}


@pytest.mark.parametrize("virtual", [0, VIRTUAL])
def test_what_is_timed_has_the_shapes_of_training_and_both_give_the_same(
    monkeypatch: pytest.MonkeyPatch, virtual: int
) -> None:
    model = build_model("llama")
    calls: dict[str, Any] = {}

    def watching(name: str, own: Any) -> Any:
        def attend(layer: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
            output = own(layer, query, key, value, mask, **options)
            calls[name] = query, key, value, mask, output[0]
            return output

        return attend

    eager = module.eager_attention
    monkeypatch.setattr(module, "sdpa_attention", watching("sdpa", module.sdpa_attention))
    monkeypatch.setattr(module, "eager_attention", lambda layer: watching("eager", eager(layer)))
    attention_seconds(model, rows=ROWS, tokens=TOKENS, virtual_tokens=virtual)
    for query, key, value, mask, output in calls.values():
        assert query.shape == (ROWS, 4, TOKENS, 8)
        assert key.shape == value.shape == (ROWS, 2, virtual + TOKENS, 8)
        assert mask.shape[-2:] == (TOKENS, virtual + TOKENS)
        assert query.requires_grad
        assert key.requires_grad
        assert output.requires_grad
        seen = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
        assert seen.sum(dim=1).tolist() == [virtual + 1 + token for token in range(TOKENS)]
        padded = mask[-1, 0] if mask.dtype == torch.bool else mask[-1, 0] == 0
        assert not padded[: TOKENS - 1, -1].any()  # the last token of the last text
        assert padded[:, :virtual].all()
    torch.testing.assert_close(calls["sdpa"][-1], calls["eager"][-1])


def test_eager_attention_that_bypasses_the_interface_is_left_out() -> None:
    model = build_model("gpt2", reorder_and_upcast_attn=True)
    assert set(attention_seconds(model, rows=ROWS, tokens=TOKENS, virtual_tokens=VIRTUAL)) == {"sdpa"}
