"""Timing generated tokens, with a clock that only forward passes move."""

import pytest
import torch

from prefixkit.errors import DataError
from prefixkit.generation import latency, token_seconds


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


def test_the_model_reads_the_prefix_meanwhile(base, prefix, monkeypatch):
    widths: list[int] = []  # of the keys that the first layer attends to
    attend = torch.nn.functional.scaled_dot_product_attention

    def watch(query, key, *rest, **options):
        widths.append(key.shape[-2])
        return attend(query, key, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    layers = base.model.config.num_hidden_layers
    token_seconds(base, "review :", tokens=2)
    token_seconds(base, "review :", tokens=2, prefix=prefix)
    bare, prefixed = widths[: 3 * layers : layers], widths[3 * layers :: layers]
    assert bare == [2, 3, 4]
    assert prefixed[0] == 7  # of what follows the prompt each token may have a kernel of its own


def test_what_does_not_fit_the_context_is_refused(base, prefix):
    limit = base.context_tokens
    with pytest.raises(DataError, match=f"prefix 5 .* exceed the model's context of {limit}"):
        token_seconds(base, "review :", tokens=limit - 5, prefix=prefix)
