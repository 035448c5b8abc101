"""The chunked loss equals the model's own cross-entropy, gradients included."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from prefixkit.training import loss as module
from prefixkit.training.loss import ScoredLoss, has_plain_head, summed_loss


def test_scored_loss_equals_cross_entropy_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 3)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(17, 6, dtype=torch.float64, generator=generator)
    bias = torch.randn(17, dtype=torch.float64, generator=generator)
    targets = torch.randint(17, (10,), generator=generator)
    ours = ScoredLoss.apply(hidden, targets, weight, bias)
    plain = nn.functional.cross_entropy(hidden @ weight.T + bias, targets, reduction="sum")
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=0)
    (mine,) = torch.autograd.grad(2.5 * ours, hidden)
    (theirs,) = torch.autograd.grad(2.5 * plain, hidden)
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


def test_scored_loss_passes_gradcheck() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(7, 5, dtype=torch.float64, generator=generator)
    targets = torch.tensor([0, 6, 3, 3])
    assert torch.autograd.gradcheck(lambda h: ScoredLoss.apply(h, targets, weight, None), (hidden,))


def test_a_plain_head_is_recognised_and_a_soft_capped_one_is_not(make_tiny_llama: Callable[..., Any]) -> None:
    capped = Gemma2ForCausalLM(
        Gemma2Config(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=8, final_logit_softcapping=5.0)
    )  # fmt: skip
    assert has_plain_head(make_tiny_llama())
    assert not has_plain_head(capped)


def test_both_ways_to_the_loss_agree_and_skip_unscored_positions(make_tiny_llama: Callable[..., Any]) -> None:
    model = make_tiny_llama().double()
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, 100, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    batch = {"input_ids": ids, "attention_mask": mask}
    fast = summed_loss(model, batch, labels, plain_head=True)
    slow = summed_loss(model, batch, labels, plain_head=False)
    theirs = model(**batch, labels=labels).loss * (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(fast, slow, atol=1e-10, rtol=0)
    torch.testing.assert_close(fast, theirs.double(), atol=1e-4, rtol=1e-6)  # theirs is computed in float32
