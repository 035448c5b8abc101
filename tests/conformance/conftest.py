"""What every cell needs: float64 throughout, and the scene of its family."""

from collections.abc import Callable

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from conformance.families import FAMILIES
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """By default, families off the core generate greedily and with beams only; `make test-all` tries every way."""
    for item in items:
        cell, call = item.get_closest_marker("cell"), getattr(item, "callspec", None)
        family = None if call is None else call.params.get("any_family")
        if item.path.name != "test_generation.py" or item.path.parent.name != "conformance" or family is None:
            continue
        if not FAMILIES[family].core and (cell is None or cell.args[0] not in ("greedy", "beams")):
            item.add_marker(pytest.mark.slow)
