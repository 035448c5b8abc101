"""One small model and one batch for PEFT and for us."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

P = 5


@pytest.fixture
def base(make_tiny_llama: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A fresh float64 Llama: 2 layers, 4 query heads, 2 KV heads of 8."""
    return make_tiny_llama().double()


@pytest.fixture
def batch(tiny_tokenizer: Any) -> dict[str, Tensor]:
    """Three texts of which two are padded on the right, and their labels."""
    dice = torch.Generator().manual_seed(2)
    ids = torch.randint(4, len(tiny_tokenizer), (3, 9), generator=dice)
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[2, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
