"""Timing generated tokens, with a clock that only forward passes move."""

import pytest
import torch

from prefixkit.errors import DataError
from prefixkit.generation import encode_prompts, latency, token_seconds
from prefixkit.injection import attach


@pytest.fixture
def passes(base, monkeypatch):
    """Forward passes so far, each of which takes two seconds."""
    counted: list[int] = []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: 2.0 * len(counted))
    hook = base.model.register_forward_pre_hook(lambda *_: counted.append(1))
    yield counted
    hook.remove()


def test_a_time_is_one_forward_pass(base, prefix, passes):
    assert token_seconds(base, "review :", tokens=5, prefix=prefix) == [2.0] * 5
    assert len(passes) == 6  # the first one reads the prompt and is not counted


def test_a_text_does_not_end_early(base, passes):
    """With a head that always likes the end of text best."""
    head = base.model.get_output_embeddings()
    head.register_forward_hook(
        lambda _, args, out: (
            torch.nn.functional.one_hot(torch.tensor([[base.tokenizer.eos_token_id]]), out.shape[-1])
            .expand_as(out)
            .to(out)
        )
    )
    assert len(token_seconds(base, "review :", tokens=7)) == 7


@pytest.mark.parametrize("has_prefix", [False, True])
def test_timed_tokens_are_those_the_model_likes_best(base, prefix, has_prefix, monkeypatch):
    written = []
    generate = latency.generate_ids
    monkeypatch.setattr(latency, "generate_ids", lambda *a, **o: written.append(generate(*a, **o)) or written[-1])
    chosen = prefix if has_prefix else None
    token_seconds(base, "review :", tokens=4, prefix=chosen)
    ids = encode_prompts(base, ["review :"])[0]
    with torch.no_grad(), attach(base.model, chosen):
        for _ in range(5):
            ids.append(base.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    assert written[0].tolist() == [ids[-5:]]


def test_what_does_not_fit_the_context_is_refused(base, prefix):
    limit = base.context_tokens
    with pytest.raises(DataError, match=f"prefix 5 .* exceed the model's context of {limit}; .* or lower tokens"):
        token_seconds(base, "review :", tokens=limit - 5, prefix=prefix)
