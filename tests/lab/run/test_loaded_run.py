"""A run in use: asked as it was trained, with its own settings, in Python as on the command line."""

import dataclasses
import inspect
import json
from pathlib import Path

import pytest
import torch

import prefixkit as pk
from prefixkit.config import Recipe
from prefixkit.errors import ArtefactError, ConfigError, DataError
from prefixkit.generation import generate_texts
from prefixkit.lab.run.loaded_run import load_run
from prefixkit.lab.run.run import Run
from prefixkit.prefix import Head, HeadKind
from processes import prefixkit

from ..conftest import TrainOnce
from .test_run import change


def test_a_run_generates_as_its_recipe_says(run: Run) -> None:
    loaded = pk.load_run(str(run.folder))
    base, prefix, recipe = loaded
    assert loaded.generate() == generate_texts(base, ["the film"], recipe.generation, prefix=prefix)
    assert loaded.generate(["the film"] * 3, seed=1, max_new_tokens=2) == generate_texts(
        base, ["the film"] * 3, recipe.generation.model_copy(update={"max_new_tokens": 2}), seed=1, prefix=prefix
    )
    assert loaded.generate([]) == []


def test_python_and_the_command_line_say_the_same(run: Run) -> None:
    found = prefixkit("generate", str(run.folder), "-p", "i loved it", "-n", "2", "--json", "--temperature", "0.5")
    texts = [json.loads(line)["text"] for line in found.stdout.splitlines()]
    assert load_run(run.folder).generate(["i loved it"] * 2, temperature=0.5) == texts


def test_a_question_is_put_as_it_was_in_training(recipe: Recipe, tmp_path: Path, train_once: TrainOnce) -> None:
    rows = [{"q": f"was it great {place}", "a": f"it was {place}"} for place in range(90)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = {"source": str(path), "format": "input_target", "input_column": "q", "target_column": "a",
            "label_column": None, "keep_label": None, "prompt": "", "separator": " => "}  # fmt: skip
    changed = change(recipe, data=data, evaluation={"samples": 0, "contrast_rows": 0})
    loaded = load_run(train_once(changed, tmp_path / "run").folder)
    assert loaded.prompt("was <br /> it great") == "was it great => "
    assert loaded.prompt("was it great", raw=True) == "was it great"
    assert loaded.generate(["was it great"]) == generate_texts(
        loaded.base, ["was it great => "], loaded.recipe.generation, prefix=loaded.prefix
    )


def test_what_cannot_be_asked_is_refused(run: Run) -> None:
    loaded = load_run(run.folder)
    with pytest.raises(ConfigError, match=r"^generation.temperatur: unknown key; did you mean .temperature"):
        loaded.generate(temperatur=0.5)
    with pytest.raises(ConfigError, match=r"^generation.top_p: "):
        loaded.generate(top_p=2.0)
    with pytest.raises(DataError, match=r"^prompts: expected a list of prompts, got one text; write \[prompt\]$"):
        inspect.unwrap(type(loaded).generate)(loaded, "the film")


def test_a_run_that_learned_labels_writes_nothing(run: Run) -> None:
    loaded = load_run(run.folder)
    head = Head(HeadKind.SEQUENCE, ("a", "b"), torch.zeros(2, 32), torch.zeros(2))
    loaded = loaded._replace(prefix=dataclasses.replace(loaded.prefix, head=head))
    with pytest.raises(ArtefactError, match="this artefact learned labels, and writes no text; classify"):
        loaded.prompt("the film")
