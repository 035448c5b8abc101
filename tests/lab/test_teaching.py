"""The sizes of the notebooks."""

from collections import Counter
from pathlib import Path

import pytest

from prefixkit import load_base_model, load_recipe
from prefixkit.data import prepare
from prefixkit.errors import ConfigError
from prefixkit.lab import teaching


def test_at_teaching_size_the_settings_of_the_notebook_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(teaching.VARIABLE, raising=False)
    assert not teaching.is_tiny()
    assert teaching.overrides() == []
    assert teaching.runs_folder() == Path("runs")


def test_at_tiny_size_a_recipe_reads_nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(teaching.VARIABLE, "tiny")
    recipe = load_recipe("positive-reviews", ["data.max_rows=3000", "train.steps=99", *teaching.overrides()])
    assert recipe.train.steps < 99
    base = load_base_model(recipe.model.base)
    data = prepare(recipe.data, base.tokenizer, prefix_tokens=20, context_tokens=base.context_tokens)
    assert data.counts.read == 240
    assert data.counts.duplicates == 0
    assert min(len(data.train), len(data.test), len(data.contrast)) >= 8
    assert Counter(row.label for row in data.judge_rows)["negative"] > 20
    unknown = base.tokenizer.unk_token_id
    assert all(unknown not in example.input_ids for example in data.train)
    assert not teaching.runs_folder().is_relative_to(Path.cwd())


def test_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(teaching.VARIABLE, "tinyy")
    with pytest.raises(ConfigError, match="PREFIXKIT_NOTEBOOK_SIZE: expected teaching or tiny, got 'tinyy'.*tiny"):
        teaching.size()
