"""What every cell needs: float64 throughout, and the scene of its family."""

from collections.abc import Callable, Iterator

import jaxtyping
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conformance.scene import Scene, make_scene
from prefixkit.prefix import Prefix


@pytest.fixture
def scene(
    any_family: str,
    all_float64: None,
    make_model: Callable[..., PreTrainedModel],
    make_prefix: Callable[..., Prefix],
    make_ids: Callable[..., Tensor],
) -> Scene:
    """The family's model, three rows of prefixes, and their text."""
    return make_scene(any_family, make_model(any_family), make_prefix, make_ids)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Signatures are not checked while dynamo traces: it does not understand the checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
