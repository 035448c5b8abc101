"""The families prefixkit is held to, as tiny random float64 models, and the second implementation of injection."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from prefixkit.models.fingerprint import fingerprint
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import BaseCard, Prefix, PrefixStates, SiteStates

VOCABULARY = 97
CONTEXT = 64


@dataclass(frozen=True)
class Family:
    """One model family: its configuration, whether a window hides text from text, whether it knows sdpa."""

    config: type[PretrainedConfig]
    settings: dict[str, Any] = field(default_factory=dict)
    window: int | None = None
    has_sdpa: bool = True


ROTARY: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": CONTEXT, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = ROTARY | {"num_key_value_heads": 2}

FAMILIES: dict[str, Family] = {
    "gpt2": Family(GPT2Config, {
        "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT,
        "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "llama": Family(LlamaConfig, GROUPED),
    "qwen2": Family(Qwen2Config, GROUPED),
    "qwen3": Family(Qwen3Config, GROUPED | {"head_dim": 16}),
    "gemma2": Family(Gemma2Config, GROUPED | {
        "head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
        window=4, has_sdpa=False),
    "gemma3": Family(Gemma3TextConfig, GROUPED | {"head_dim": 16, "sliding_window": 4}, window=4),
    "mistral": Family(MistralConfig, GROUPED | {"sliding_window": None}),
    "mistral-window": Family(MistralConfig, GROUPED | {"sliding_window": 4}, window=4),
    "opt": Family(OPTConfig, {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48,
        "word_embed_proj_dim": 32, "max_position_embeddings": CONTEXT, "init_std": 0.2, "dropout": 0.0,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt-neox": Family(GPTNeoXConfig, ROTARY | {"rotary_pct": 0.5}),
    "phi3": Family(Phi3Config, GROUPED | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
}  # fmt: skip
GLOBAL = [name for name, family in FAMILIES.items() if family.window is None]
WINDOWED = [name for name, family in FAMILIES.items() if family.window is not None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for `family`, `global_family` or `windowed_family` once per family of that kind."""
    for fixture, names in (("family", list(FAMILIES)), ("global_family", GLOBAL), ("windowed_family", WINDOWED)):
        marked = any(fixture in str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize"))
        if fixture in metafunc.fixturenames and not marked:
            metafunc.parametrize(fixture, names)


def build_model(name: str, attention: str = "sdpa", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random frozen model in float64, its biases and norms perturbed so that no zero hides a bug."""
    family = FAMILIES[name]
    attention = "eager" if name == "gemma2" else attention  # soft-capping exists in eager attention only
    settings = {"attn_implementation": attention if family.has_sdpa else "eager"} | family.settings | changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(family.config(**settings)).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


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
