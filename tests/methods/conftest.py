"""Every method that changes a model's layers, moved off its start, where it would change nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from prefixkit.config import MethodConfig
from prefixkit.methods import DeltaModule, build_delta

#: In one word, or as settings; every method and every kind of one.
METHODS: dict[str, Any] = {
    "lora": {"kind": "lora", "rank": 2},
    "ia3": "ia3",
    "bitfit": "bitfit",
    "bitfit-added": {"kind": "bitfit", "biases": "added"},
    "houlsby": {"kind": "adapter", "style": "houlsby", "bottleneck": 3},
    "pfeiffer": {"kind": "adapter", "bottleneck": 3},
    "parallel": {"kind": "adapter", "style": "parallel", "bottleneck": 3},
    "full": "full",
    "top-layers": {"kind": "top-layers", "top_layers": 1},
}


def config_of(name: str) -> MethodConfig:
    return MethodConfig.model_validate(METHODS[name])


@pytest.fixture
def make_delta() -> Callable[..., DeltaModule]:
    """A factory of changes; `size` is how far the numbers are from their start."""

    def make(model: PreTrainedModel, name: str, *, size: float = 0.3, seed: int = 0) -> DeltaModule:
        generator = torch.Generator().manual_seed(seed)
        delta = build_delta(model, config_of(name), generator)
        with torch.no_grad():
            for number in delta.numbers:
                number.add_(size * torch.randn(number.shape, generator=generator, dtype=number.dtype))
        return delta

    return make
