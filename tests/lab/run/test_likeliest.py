"""Learning from the rows that the base model itself finds likeliest: which those are, and that a run keeps to them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixkit.config import Recipe, validate_recipe
from prefixkit.data import PreparedData
from prefixkit.errors import ArtefactError, ConfigError, TrainingError
from prefixkit.files import read_json, write_json
from prefixkit.lab.run import likeliest as module
from prefixkit.lab.run.likeliest import keep_likeliest, likeliest
from prefixkit.lab.run.loading import load_for
from prefixkit.lab.run.run import evaluate_run, train_run
from prefixkit.models import Base

from ..conftest import quiet
from .test_run import change, content

KEPT = Path("training", "likeliest.json")


@pytest.fixture
def loaded(recipe: Recipe) -> tuple[Base, PreparedData]:
    return load_for(recipe)


def refuse(*_: Any, **__: Any) -> Any:
    pytest.fail("the base model was asked again")


def test_the_likeliest_have_the_lowest_loss_per_learned_token(loaded: tuple[Base, PreparedData]) -> None:
    base, data = loaded
    model = base.model.double()

    def cost(place: int) -> float:
        """One example alone, in float64, written out."""
        example = data.train[place]
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        learned = [at for at, label in enumerate(example.labels) if label != -100 and at > 0]
        return -sum(float(logits[at - 1, example.input_ids[at]]) for at in learned) / len(learned)

    with torch.no_grad():
        costs = [cost(place) for place in range(len(data.train))]
    kept = likeliest(base, data.train, 0.3)
    assert len(kept) == round(0.3 * len(costs)) > 3
    assert list(kept) == sorted(kept)
    assert sorted(costs[place] for place in kept) == sorted(costs)[: len(kept)]
    assert len({len(data.train[place].input_ids) for place in kept}) > 1


def test_at_least_one_example_is_kept(loaded: tuple[Base, PreparedData]) -> None:
    base, data = loaded
    assert len(likeliest(base, data.train, 1e-6)) == 1


def test_everything_but_training_examples_stays(loaded: tuple[Base, PreparedData], tmp_path: Path) -> None:
    base, data = loaded
    assert keep_likeliest(tmp_path, base, data, 1.0, quiet) is data
    half = keep_likeliest(tmp_path, base, data, 0.5, quiet)
    assert set(half.train) < set(data.train)
    assert (half.counts.train, half.counts.unlikely) == (len(half.train), len(data.train) - len(half.train))
    assert (half.validation, half.test, half.contrast) == (data.validation, data.test, data.contrast)
    assert half.hash == data.hash


def test_a_run_chooses_once(loaded: tuple[Base, PreparedData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, data = loaded
    first = keep_likeliest(tmp_path, base, data, 0.5, quiet)
    monkeypatch.setattr(module, "heldout_loss", refuse)
    assert keep_likeliest(tmp_path, base, data, 0.5, quiet).train == first.train


@pytest.mark.parametrize("of_another", ["data_hash", "base"])
def test_with_other_data_or_another_base_it_is_chosen_anew(
    loaded: tuple[Base, PreparedData], tmp_path: Path, of_another: str
) -> None:
    base, data = loaded
    expected = keep_likeliest(tmp_path, base, data, 0.5, quiet)
    write_json(tmp_path / KEPT, read_json(tmp_path / KEPT) | {of_another: "another", "kept": [0]})
    assert keep_likeliest(tmp_path, base, data, 0.5, quiet).train == expected.train


@pytest.mark.parametrize("kept", [None, [], [0, 10_000], ["0"], [[0]], [1.0], [True], [2, 1], [1, 1], [-1]])
def test_a_damaged_choice_is_named(loaded: tuple[Base, PreparedData], tmp_path: Path, kept: object) -> None:
    base, data = loaded
    keep_likeliest(tmp_path, base, data, 0.5, quiet)
    write_json(tmp_path / KEPT, read_json(tmp_path / KEPT) | {"kept": kept})
    with pytest.raises(ArtefactError, match=r"likeliest.json: damaged; delete it, and the base model is asked again"):
        keep_likeliest(tmp_path, base, data, 0.5, quiet)


def test_a_run_learns_from_them_alone_however_often_it_is_stopped(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = change(recipe, data={"likeliest": 0.3})
    asked: list[tuple[str, int, int]] = []

    def listen(what: str, done: int, of: int, words: str) -> None:
        asked.append((what, done, of))

    whole = train_run(few, tmp_path / "whole", report=listen)
    counts = read_json(whole.folder / "run.json")["data_counts"]
    assert counts["train"] == round(0.3 * (counts["train"] + counts["unlikely"]))
    assert ("choosing examples", *[counts["train"] + counts["unlikely"]] * 2) in asked
    all_rows = train_run(recipe, tmp_path / "all", report=quiet)
    assert whole.prefix.card.content_hash != all_rows.prefix.card.content_hash
    assert read_json(whole.folder / "run.json")["choosing_seconds"] > 0
    assert "choosing_seconds" not in read_json(all_rows.folder / "run.json")

    def stop(what: str, done: int, of: int, words: str) -> None:
        if what == "training" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(few, tmp_path / "halves", report=stop)
    monkeypatch.setattr(module, "heldout_loss", refuse)  # what was chosen is remembered
    halves = train_run(few, tmp_path / "halves", resume=True, report=quiet)
    assert halves.prefix.card.content_hash == whole.prefix.card.content_hash
    assert halves.scores == whole.scores


def test_a_run_without_its_training_folder_is_measured_as_before(recipe: Recipe, tmp_path: Path) -> None:
    run = train_run(change(recipe, data={"likeliest": 0.3}), tmp_path / "run", report=quiet)
    shutil.rmtree(run.folder / "training")
    again = evaluate_run(run.folder, change(recipe, data={"likeliest": 0.3}), report=quiet)
    assert again.scores == run.scores


def test_another_share_is_another_run(recipe: Recipe, tmp_path: Path, train_once: Callable[..., Any]) -> None:
    run = train_once(change(recipe, data={"likeliest": 0.3}), tmp_path / "run")
    before = content(run.folder)
    with pytest.raises(ConfigError, match=r"data.likeliest: the run was started with 0.3, not 0.4"):
        train_run(change(recipe, data={"likeliest": 0.4}), run.folder, resume=True, report=quiet)
    with pytest.raises(TrainingError, match="the data changed since this run was started"):
        evaluate_run(run.folder, change(recipe, data={"likeliest": 0.4}), report=quiet)
    assert content(run.folder) == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stream": True, "likeliest": 0.5}, "stream reads rows as they come, likeliest needs all of them"),
        (
            {"format": "classes", "label_column": "label", "likeliest": 0.5},
            "format classes learns labels, not text; leave likeliest out",
        ),
        ({"likeliest": 0}, "data.likeliest"),
    ],
)
def test_where_there_is_nothing_to_choose_it_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_recipe({"data": data})
