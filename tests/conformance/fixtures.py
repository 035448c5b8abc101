"""Fixtures shared by `injection/`, `models/` and `conformance/`: tiny models, prefixes, texts, and a filled cache."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from conformance.encoder_families import ENCODER_DECODERS, ENCODERS
from conformance.families import CORE, FAMILIES, GLOBAL, VOCABULARY, WINDOWS, build_model
from conformance.precision import KeepFloat64
from prefixkit.models.fingerprint import fingerprint
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import BaseCard, Prefix, PrefixStates, SiteStates

#: Fixture -> the families a test that asks for it runs over.
KINDS = {
    "family": CORE,
    "global_family": [name for name in CORE if name in GLOBAL],
    "windowed_family": [name for name in CORE if name in WINDOWS],
    "any_family": list(FAMILIES),
    "any_global_family": GLOBAL,
    "encoder_decoder": list(ENCODER_DECODERS),
    "core_encoder_decoder": ["t5", "bart", "whisper"],
    "encoder": list(ENCODERS),
    "core_encoder": ["bert", "modernbert"],
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for one of `KINDS` once per family of that kind."""
    for fixture, names in KINDS.items():
        marked = any(fixture in str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize"))
        if fixture in metafunc.fixturenames and not marked:
            metafunc.parametrize(fixture, names)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to `make test-all` what is marked ``every_family`` and runs over a family off the core.

    Keywords of the mark name a case that is tried for every family by default: ``every_family(padded="left")``.
    """
    core = {*CORE, *KINDS["core_encoder_decoder"], *KINDS["core_encoder"]}
    for item in items:
        mark, call = item.get_closest_marker("every_family"), getattr(item, "callspec", None)
        if mark is None or call is None:
            continue
        family = next(
            call.params[name] for name in ("any_family", "encoder_decoder", "encoder", "name") if name in call.params
        )
        kept = mark.kwargs and all(call.params[name] == value for name, value in mark.kwargs.items())
        if family not in core and not kept:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """`build_model`, remembered where a test does not change the model's settings."""
    known: dict[tuple[str, str], PreTrainedModel] = {}

    def make(name: str, attention: str = "sdpa", fresh: bool = False, **changes: Any) -> PreTrainedModel:
        if changes or fresh:
            return build_model(name, attention, **changes)
        if (name, attention) not in known:
            known[name, attention] = build_model(name, attention)
        return known[name, attention]

    return make


@pytest.fixture(scope="session")
def make_states() -> Callable[..., PrefixStates]:
    """Random states for a model; `lengths` is one number or one per layer."""

    def make(
        model: PreTrainedModel, lengths: int | list[int] = 3, *, seed: int = 1, gated: bool = False, grad: bool = False
    ) -> PrefixStates:
        generator = torch.Generator().manual_seed(seed)
        geometry = inspect_model(model).geometry
        each = [lengths] * len(geometry.sites) if isinstance(lengths, int) else lengths

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)

        sites = tuple(
            SiteStates(
                numbers(site.kv_heads, p, site.head_dim),
                numbers(site.kv_heads, p, site.head_dim),
                numbers(site.query_heads) if gated else None,
            )
            for site, p in zip(geometry.sites, each, strict=True)
        )
        return PrefixStates(geometry, sites)

    return make


@pytest.fixture(scope="session")
def make_prefix(make_states: Callable[..., PrefixStates]) -> Callable[..., Prefix]:
    """A random prefix for a model."""

    def make(
        model: PreTrainedModel, lengths: int | list[int] = 3, *, offset: int | None = None, **kinds: Any
    ) -> Prefix:
        base = BaseCard(id="tiny", fingerprint=fingerprint(model))
        return Prefix.from_states(make_states(model, lengths, **kinds), base=base, position_offset=offset)

    return make


@pytest.fixture(scope="session")
def make_ids() -> Callable[..., Tensor]:
    """Random token ids without special tokens."""

    def make(*shape: int, seed: int = 2) -> Tensor:
        return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def cache_logits() -> Callable[..., Tensor]:
    """The second implementation: the prefix as `past_key_values`, one for all rows."""

    def logits(model: PreTrainedModel, states: PrefixStates, ids: Tensor, mask: Tensor | None) -> Tensor:
        rows, tokens = ids.shape
        p = states.num_virtual_tokens
        cache = DynamicCache()
        for layer, site in enumerate(states.sites):
            cache.update(site.key.expand(rows, -1, -1, -1), site.value.expand(rows, -1, -1, -1), layer)
        if mask is not None:
            mask = torch.cat([mask.new_ones(rows, p), mask], dim=1)
        positions = torch.arange(p, p + tokens)[None].expand(rows, -1)
        if model.config.model_type == "opt" and mask is not None:  # OPT counts positions by the mask
            positions = None
        out = model(input_ids=ids, past_key_values=cache, attention_mask=mask, position_ids=positions)
        return out.logits

    return logits


@pytest.fixture
def all_float64() -> Iterator[None]:
    """Keeps norms and softmaxes, which families run in float32, in float64: whatever differs then is a difference."""
    with KeepFloat64():
        yield
