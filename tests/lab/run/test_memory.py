"""A memory budget: what a step holds is foretold well enough, and settings are chosen that fit."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import processes
from lab.run import hold
from prefixkit.config import Recipe, dump_recipe, validate_recipe
from prefixkit.data import Collator, longest_first
from prefixkit.errors import ConfigError
from prefixkit.files import read_json
from prefixkit.lab.run import memory
from prefixkit.lab.run.folder import read_recipe
from prefixkit.lab.run.loading import load_for
from prefixkit.lab.run.memory import (
    Footprint,
    fit_to_budget,
    measure_footprint,
    mixed_precision,
    parse_bytes,
    sized_like,
)
from prefixkit.lab.run.run import train_run
from prefixkit.training.start import build_model

MB = 10**6
FOOTPRINT = Footprint(held=1000 * MB, loading=1060 * MB, kept=(4 * MB,) * 24, elsewhere=0, inputs=(MB // 2,) * 24,
                      passing=4 * MB, logits=30 * MB, measuring=20 * MB, text=10 * MB)  # fmt: skip


def recipe_of(batch_size: int, accumulation: int = 1, **checkpointing: bool | int) -> Recipe:
    return validate_recipe({"train": {"batch_size": batch_size, "accumulation": accumulation, **checkpointing}})


@pytest.mark.parametrize(
    ("budget", "recipe", "rows", "accumulation", "recomputed", "texts"),
    [
        (2100, recipe_of(8), 8, 1, 0, 64),  # 1000 + 1.25 * (800 + 50) = 2063
        (2000, recipe_of(8), 4, 2, 0, 64),
        (1400, recipe_of(8), 2, 4, 0, 30),  # 1313
        (1300, recipe_of(8), 8, 1, 22, 22),  # two rows no longer fit; 1000 + 1.25 * (8 * (8 + 11 + 4) + 50) = 1293
        (1262, recipe_of(8), 8, 1, 23, 18),  # the last layer is there when it is recomputed: no better than 23 of 24
        (1250, recipe_of(8), 4, 2, 18, 18),  # 1000 + 1.25 * (4 * (24 + 9 + 4) + 50) = 1247.5
        (1087.5, recipe_of(8), 1, 8, 23, 5),
        (9000, recipe_of(8, gradient_checkpointing=True, recomputed_layers=10), 8, 1, 10, 64),
        (1900, recipe_of(6, 2), 6, 2, 0, 64),
        (1600, recipe_of(6, 2), 4, 3, 0, 46),  # twelve rows by fours
        (1270, recipe_of(1), 1, 1, 0, 19),
        (9000, recipe_of(8, gradient_checkpointing=True), 8, 1, 24, 64),  # as asked for
    ],
)
def test_the_largest_batch_that_fits_is_taken_and_a_step_reads_as_many_rows_as_before(
    budget: float, recipe: Recipe, rows: int, accumulation: int, recomputed: int, texts: int
) -> None:
    fit = fit_to_budget(FOOTPRINT, recipe, int(budget * MB))
    assert (fit.batch_size, fit.accumulation, fit.recomputed_layers) == (rows, accumulation, recomputed)
    assert fit.generation_batch_size == texts
    assert fit.peak <= budget * MB
    assert fit.batch_size * fit.accumulation == recipe.train.batch_size * recipe.train.accumulation
    applied = fit.apply(recipe)
    assert (applied.train.batch_size, applied.generation.batch_size) == (rows, texts)
    assert applied.train.gradient_checkpointing == (recomputed > 0)
    assert applied.train.recomputed_layers == (recomputed if 0 < recomputed < 24 else None)
    assert sized_like(recipe, applied) == applied


def test_processes_share_a_batch_and_each_has_a_row_of_it() -> None:
    fit = fit_to_budget(FOOTPRINT, recipe_of(8), 1400 * MB, processes=4)
    assert (fit.batch_size, fit.accumulation, fit.recomputed_layers) == (8, 1, 0)
    assert fit.peak == FOOTPRINT.peak(2, recomputed=0, texts=30) == 1400 * MB  # two rows each, and then 30 texts
    assert str(fit).endswith("in each of 4 processes")
    least = fit_to_budget(FOOTPRINT, recipe_of(8), int(1087.5 * MB), processes=4)
    assert (least.batch_size, least.accumulation, least.recomputed_layers) == (4, 2, 23)


def test_layers_that_keep_nothing_gain_nothing_by_recomputing() -> None:
    upper = dataclasses.replace(FOOTPRINT, kept=(0,) * 12 + (8 * MB,) * 12, inputs=(0,) * 12 + (MB,) * 12)
    assert upper.row(0) == upper.row(12) == 100 * MB
    assert upper.row(13) == (11 * 8 + 1 + 4) * MB
    assert upper.row(23) == (8 + 11 + 4) * MB


def test_a_model_that_cannot_recompute_gets_as_few_rows_as_it_takes() -> None:
    plain = dataclasses.replace(FOOTPRINT, kept=(), inputs=(), elsewhere=96 * MB)
    fit = fit_to_budget(plain, recipe_of(8), 1200 * MB)
    assert (fit.batch_size, fit.accumulation, fit.recomputed_layers) == (1, 8, 0)
    with pytest.raises(ConfigError, match=r"cannot be met: one row at a time takes 1\.19 GB, of which"):
        fit_to_budget(plain, recipe_of(8), 1100 * MB)


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (1070, "1.07 GB cannot be met: one row at a time with gradient checkpointing takes 1.09 GB, of which 1.00 GB "
               "are held before training; allow that, or lower data.max_tokens"),
        (1050, "1.05 GB cannot be met: loading the base model and the data took 1.06 GB already; allow more than that"),
    ],
)  # fmt: skip
def test_a_budget_that_cannot_be_met_says_what_would_do(budget: int, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fit_to_budget(FOOTPRINT, recipe_of(8), budget * MB)
    assert str(caught.value) == f"--memory-budget: {reason}"
    assert FOOTPRINT.peak(1, recomputed=24) == 1087.5 * MB


@pytest.mark.parametrize(("text", "size"), [("1.5GB", 1_500_000_000), (" 800mb ", 800 * MB), ("2e3 KB", 2 * MB)])
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["1.5", "GB", "-1GB", "0MB", "nanGB", "1e999GB", "much"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory-budget: expected a size such as 1.5GB or 800MB, got "):
        parse_bytes(text)


def recipe_of_wide(recipe: Recipe, tiny_llama_dir: Path, folder: Path) -> dict[str, Any]:
    """Values of a recipe with a model whose steps hold far more than a test does otherwise, and texts of 120 tokens."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_llama_dir)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=384, intermediate_size=1024, num_hidden_layers=8,
                         num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256)  # fmt: skip
    with torch.random.fork_rng():
        LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    texts = [json.dumps({"text": " ".join(["film", str(n)] * 60), "label": "a"}) for n in range(60)]
    (folder / "long.jsonl").write_text("\n".join(texts), encoding="utf-8")
    values = recipe.model_dump(mode="json")
    values["model"]["base"], values["data"]["source"] = str(folder / "base"), str(folder / "long.jsonl")
    values["data"]["max_tokens"] = 120
    return values


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory can be begun anew on Linux alone")
@pytest.mark.parametrize(
    ("rows", "recomputed", "layers"),
    [(2, 0, None), (8, 0, None), (8, 8, None), (8, 6, None), (16, 0, [6, 7]), (16, 7, [5, 6, 7])],
)
def test_what_a_step_holds_is_foretold(
    rows: int, recomputed: int, layers: list[int] | None, recipe: Recipe, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    values = recipe_of_wide(recipe, tiny_llama_dir, tmp_path)
    values["prefix"]["layers"] = layers
    values["train"] |= {"gradient_checkpointing": recomputed > 0, "recomputed_layers": recomputed or None}
    path = tmp_path / "long.yaml"
    path.write_text(dump_recipe(validate_recipe(values)), encoding="utf-8")
    done = processes.run(hold.main, str(path), str(rows))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["found"] > 20 * MB
    # What passes through one layer is told too high rather than too low; where few keep anything, it is most of it.
    assert told["found"] * 0.9 < told["expected"] < told["found"] * (1.6 if layers is None else 2.2), told


def test_a_run_within_a_budget_says_what_was_chosen_and_is_resumed_with_it(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="prefixkit"):
        run = train_run(recipe, tmp_path / "run", memory_budget=10**12, report=lambda *_: None)
    assert any(message.startswith("memory budget: batches of 4 x 1, no gradient che") for message in caplog.messages)
    small = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": 2, "accumulation": 2})})
    other = train_run(small, tmp_path / "other", report=lambda *_: None)
    again = train_run(recipe, other.folder, resume=True, memory_budget=10**12, report=lambda *_: None)
    assert read_recipe(again.folder).train.batch_size == 2
    assert again.prefix.card.content_hash == other.prefix.card.content_hash
    with pytest.raises(ConfigError, match=r"^train\.batch_size: .*if --memory-budget chose that, give it"):
        train_run(recipe, other.folder, resume=True, report=lambda *_: None)
    with pytest.raises(ConfigError, match="--memory-budget: 0.00 GB cannot be met: loading the base model and the"):
        train_run(recipe, tmp_path / "third", memory_budget=1000, report=lambda *_: None)
    assert not (tmp_path / "third").exists()
    assert read_json(run.folder / "run.json")["recipe"]["train"]["batch_size"] == 4


@pytest.mark.slow
def test_a_run_stays_within_its_budget(recipe: Recipe, tiny_llama_dir: Path, tmp_path: Path) -> None:
    values = recipe_of_wide(recipe, tiny_llama_dir, tmp_path)
    values["train"] |= {"batch_size": 32, "steps": 3}
    path = tmp_path / "long.yaml"
    path.write_text(dump_recipe(validate_recipe(values)), encoding="utf-8")
    records = {}
    for name, budget in (("free", "100GB"), ("held", "1GB")):
        done = processes.prefixkit("train", str(path), "--out", str(tmp_path / name), "--memory-budget", budget)
        assert done.returncode == 0, done.stderr
        records[name] = read_json(tmp_path / name / "run.json")
    assert records["held"]["peak_memory_bytes"] < 10**9 < records["free"]["peak_memory_bytes"]
    chosen = [record["recipe"]["train"] for record in records.values()]
    assert [train["batch_size"] * train["accumulation"] for train in chosen] == [32, 32]
    assert chosen[1]["batch_size"] < 32


def test_of_a_stream_a_row_as_long_as_any_can_be_is_measured(recipe: Recipe) -> None:
    streamed = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"stream": True, "stream_head": 80, "max_tokens": 30})}
    )
    _, data = load_for(streamed)
    assert max(example.num_tokens for example in data.train) < 30
    longest, *others = longest_first(data, 30)
    assert len(longest.input_ids) == len(longest.labels) == 30
    assert tuple(others) == data.train
    _, plain = load_for(recipe)
    assert longest_first(plain, 30) == plain.train


@pytest.mark.parametrize(
    ("dtype", "method", "autocast"),
    [
        ("bfloat16", "full", False),
        ("bfloat16", "prefix", False),
        ("float32", "full", False),
        ("float32", "prefix", True),
    ],
)
def test_what_rows_take_is_told_from_weights_in_another_format(
    dtype: str, method: str, autocast: bool, recipe: Recipe, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    values = recipe_of_wide(recipe, tiny_llama_dir, tmp_path)
    values["model"]["dtype"], values["method"] = dtype, {"kind": method}
    values["train"] |= {"autocast": autocast}
    changed = validate_recipe(values)
    base, data = load_for(changed)
    footprint = measure_footprint(base, data.train, changed, ())
    longest = max(data.train, key=lambda example: example.num_tokens)
    model = build_model(base, data.train, changed, ())
    found = []
    for rows in (1, 3):
        batch = Collator(base.tokenizer.pad_token_id)([longest] * rows)
        with memory._saved(model.train(), []) as saved, mixed_precision(base, changed.train):
            model(**batch)
        found.append(saved.elsewhere)
    assert 2 * (sum(footprint.kept) + footprint.elsewhere) == pytest.approx(found[1] - found[0], rel=0.02)
