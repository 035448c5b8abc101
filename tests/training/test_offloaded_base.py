"""A run on a base that accelerate offloads to disk takes the same steps as on the base in memory."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefixkit.models.fingerprint import weights_hash
from prefixkit.training import train_prefix


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training_equals_training_in_memory(
    checkpointing: bool, make_recipe: Any, load: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(train={"steps": 3, "learning_rate": 0.05, "gradient_checkpointing": checkpointing})
    base, data = load(recipe)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk",
              "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    spread = AutoModelForCausalLM.from_pretrained(
        tiny_llama_dir, device_map=places, offload_folder=tmp_path / "offloaded", dtype=torch.float32
    )
    before = weights_hash(spread)
    found = []
    for name, model in {"memory": base.model, "disk": spread.eval().requires_grad_(False)}.items():
        here = dataclasses.replace(base, model=model)
        outcome = train_prefix(
            here, data.train, recipe, tmp_path / name, measure=lambda *_: 0.0, report=lambda *_: None
        )
        found.append(outcome.trained.states)
    for one, other in zip(found[0].sites, found[1].sites, strict=True):
        torch.testing.assert_close(one.key, other.key, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.value, other.value, rtol=1e-5, atol=1e-6)
    assert weights_hash(spread) == before == weights_hash(base.model)
