"""Tiny random float64 models of the families both PEFT and prefixkit take, and checkpoints that PEFT itself trained."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prefixkit.models.fingerprint import fingerprint
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import BaseCard, Prefix, PrefixStates

VOCABULARY, CONTEXT, P = 97, 64, 5
SPECIAL: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS: dict[str, Any] = SPECIAL | {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": CONTEXT,
}  # fmt: skip
ROTARY = HEADS | {"intermediate_size": 48, "initializer_range": 0.2}
GROUPED = ROTARY | {"num_key_value_heads": 2}
GPT2: dict[str, Any] = SPECIAL | {
    "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT, "initializer_range": 0.2,
    "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt-bigcode-mqa": ("gpt_bigcode", GPT2 | {"multi_query": True}),
    "llama": ("llama", GROUPED),
    "mistral": ("mistral", GROUPED | {"sliding_window": None}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 16}),
    "gemma": ("gemma", GROUPED | {"head_dim": 16}),
    "opt": ("opt", HEADS | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2, "dropout": 0.0}),
    "gpt-neox": ("gpt_neox", ROTARY | {"rotary_pct": 0.5}),
    "phi3": ("phi3", GROUPED | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "cohere": ("cohere", GROUPED),
    "granite": ("granite", GROUPED),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for `peft_family` once per family."""
    marked = any("peft_family" in str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize"))
    if "peft_family" in metafunc.fixturenames and not marked:
        metafunc.parametrize("peft_family", list(FAMILIES))


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """A fresh model, since PEFT may change what it wraps; biases and norms perturbed so that no zero hides a bug."""

    def make(peft_family: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
        kind, settings = FAMILIES[peft_family]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(settings | changes)))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(0.1 * torch.randn_like(parameter))
        return model.to(dtype).eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def make_prefix() -> Callable[..., Prefix]:
    """A random prefix for a model; PEFT holds a prefix in float32, whatever the model's format."""

    def make(model: PreTrainedModel, *, dtype: torch.dtype = torch.float32, **options: Any) -> Prefix:
        geometry = inspect_model(model).geometry
        dice = torch.Generator().manual_seed(1)
        rows = torch.randn(P, geometry.numbers_per_token, generator=dice).to(dtype)
        base = BaseCard(id="org/tiny", revision="a1b2", fingerprint=fingerprint(model))
        return Prefix.from_states(PrefixStates.from_rows(geometry, rows), base=base, **options)

    return make


@pytest.fixture(scope="session")
def ids() -> Tensor:
    """Three rows of text."""
    return torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session", params=["no mask", "no padding", "left"])
def mask(request: pytest.FixtureRequest) -> Tensor | None:
    """Which tokens are text."""
    if request.param == "no mask":
        return None
    mask = torch.ones(3, 9, dtype=torch.long)
    if request.param == "left":
        mask[1, :2] = mask[2, :5] = 0
    return mask


@pytest.fixture
def train_with_peft(ids: Tensor, tmp_path: Path) -> Callable[..., tuple[PeftModel, Path]]:
    """Let PEFT train a prefix for a few steps and save it; returns its model and the folder."""

    def train(model: PreTrainedModel, **settings: Any) -> tuple[PeftModel, Path]:
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, **settings)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            tuned = get_peft_model(model, config)
        start = tuned.get_prompt_embedding_to_save("default").clone()
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            tuned(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moved = (tuned.get_prompt_embedding_to_save("default") - start).abs()
        assert moved.mean() > 0.01
        folder = tmp_path / "peft checkpoint"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it looks for the base model's config on the hub
            tuned.eval().save_pretrained(folder)
        return tuned, folder

    return train
