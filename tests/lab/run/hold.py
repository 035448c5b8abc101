"""What a training step really holds, in a process of its own, beside what was expected; see test_memory.py."""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from prefixkit.config import load_recipe
from prefixkit.data import Collator, prepare
from prefixkit.lab.run.memory import measure_footprint
from prefixkit.models import load_base_model
from prefixkit.models.hardware import give_back_memory, held_memory_bytes
from prefixkit.training.start import build_model


def main() -> None:
    """Measure the recipe in argv[1] with the rows in argv[2]; the recipe says what is recomputed."""
    recipe, rows = load_recipe(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    base = load_base_model(recipe.model.base, dtype=recipe.model.dtype)
    data = prepare(recipe.data, base.tokenizer, prefix_tokens=4, context_tokens=base.context_tokens)
    longest = max(data.train, key=lambda example: example.num_tokens)
    footprint = measure_footprint(base, data.train, recipe, ())
    model = build_model(base, data.train, recipe, ()).train()
    if recipe.train.gradient_checkpointing:
        model.activation_checkpointing_enable()
    batch = Collator(base.tokenizer.pad_token_id)([longest] * rows)
    give_back_memory()
    before = held_memory_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for _ in range(3):  # the allocator lays one and the same step out anew each time: a fifth more or less
        model(**batch)["loss"].backward()
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    training = dataclasses.replace(footprint, loading=0, measuring=0, text=0)
    expected = training.peak(rows, recomputed=footprint.recomputed(recipe.train)) - footprint.held
    print(json.dumps({"found": peak - before, "expected": expected}))
