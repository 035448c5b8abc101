"""A tiny base model and a prefix that clearly changes it."""

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from prefixkit.models import Base
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import BaseCard, Prefix, PrefixStates, SiteStates


@pytest.fixture
def base(make_tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast) -> Base:
    model = make_tiny_llama().double().requires_grad_(False)
    return Base("tiny", model, tiny_tokenizer, torch.float64, "none")


@pytest.fixture
def prefix(base: Base) -> Prefix:
    """Five virtual tokens per layer of random, large keys and values."""
    geometry = inspect_model(base.model).geometry
    generator = torch.Generator().manual_seed(1)
    sites = tuple(
        SiteStates(*(3 * torch.randn(site.kv_heads, 5, site.head_dim, generator=generator).double() for _ in "kv"))
        for site in geometry.sites
    )
    return Prefix.from_states(PrefixStates(geometry, sites), base=BaseCard(id="tiny"))
