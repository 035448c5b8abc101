"""Training with the attention that is fastest here: chosen once per run, remembered, and only for training."""

from pathlib import Path
from typing import Any

import pytest

from prefixkit.compat import implementation_of
from prefixkit.config import Recipe
from prefixkit.errors import ArtefactError, ConfigError
from prefixkit.files import read_json
from prefixkit.lab.run import attending as module
from prefixkit.lab.run import run as run_module
from prefixkit.lab.run.attending import choose
from prefixkit.lab.run.run import train_run
from prefixkit.prefix import Prefix
from processes import prefixkit

from ..conftest import quiet
from .test_run import change, content

CHOSEN = Path("training", "attention.json")


@pytest.fixture
def fastest(recipe: Recipe) -> Recipe:
    return change(recipe, model={"attention": "fastest"}, evaluation={"samples": 0})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was done, and with which attention."""
    seen: list[tuple[str, str]] = []

    def watch(name: str) -> None:
        own = getattr(run_module, name)

        def call(base: Any, *args: Any, **options: Any) -> Any:
            seen.append((name, implementation_of(base.model)))
            return own(base, *args, **options)

        monkeypatch.setattr(run_module, name, call)

    watch("train_prefix")
    watch("evaluate")
    return seen


def timed(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> list[dict[str, int]]:
    asked: list[dict[str, int]] = []

    def attention_seconds(model: Any, **shape: int) -> dict[str, float]:
        asked.append(shape)
        return seconds

    monkeypatch.setattr(module, "attention_seconds", attention_seconds)
    return asked


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"sdpa": 1.0, "eager": 0.5}, "eager"),
        ({"sdpa": 1.0, "eager": 0.95}, "sdpa"),
        ({"sdpa": 0.5, "eager": 1.0}, "sdpa"),
        ({"eager": 1.0}, "eager"),
    ],
)
def test_sdpa_is_left_only_for_what_is_clearly_faster(seconds: dict[str, float], chosen: str) -> None:
    assert choose(seconds) == chosen


def test_a_run_trains_with_the_faster_and_is_measured_with_sdpa(
    fastest: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[tuple[str, str]]
) -> None:
    asked = timed(monkeypatch, sdpa=1.0, eager=0.5)
    run = train_run(fastest, tmp_path / "run", report=quiet)
    assert seen == [("train_prefix", "eager"), ("evaluate", "sdpa")]
    (shape,) = asked
    assert shape["rows"] == 4
    assert shape["virtual_tokens"] == 3
    assert 6 <= shape["tokens"] <= 20
    record = read_json(run.folder / "run.json")["attention"]
    assert record == read_json(run.folder / CHOSEN)
    assert (record["chosen"], record["seconds"]) == ("eager", {"sdpa": 1.0, "eager": 0.5})
    assert run.prefix.card.training is not None
    assert run.prefix.card.training.recipe["model"]["attention"] == "fastest"


@pytest.mark.parametrize(
    ("changes", "virtual"),
    [({"prefix": {"layer_lengths": [0, 7]}}, 7), ({"method": {"kind": "lora"}}, 0),
     ({"method": {"kind": "prompt-tuning"}}, 3)],
)  # fmt: skip
def test_as_many_virtual_tokens_are_timed_as_a_layer_has(
    fastest: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], virtual: int
) -> None:
    asked = timed(monkeypatch, sdpa=1.0, eager=2.0)
    train_run(change(fastest, **changes), tmp_path / "run", report=quiet)
    assert [shape["virtual_tokens"] for shape in asked] == [virtual]


def test_it_is_timed_on_this_machine(fastest: Recipe, tmp_path: Path) -> None:
    train_run(fastest, tmp_path / "run", report=quiet)
    record = read_json(tmp_path / "run" / CHOSEN)
    assert set(record["seconds"]) == {"sdpa", "eager"}
    assert record["chosen"] == choose(record["seconds"])


def test_a_run_that_goes_on_keeps_its_attention(
    fastest: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[tuple[str, str]]
) -> None:
    timed(monkeypatch, sdpa=1.0, eager=0.5)
    whole = train_run(fastest, tmp_path / "whole", report=quiet)

    def stop(what: str, done: int, *_: Any) -> None:
        if what == "training" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(fastest, tmp_path / "run", report=stop)
    assert timed(monkeypatch, sdpa=0.5, eager=1.0) == []  # another machine
    del seen[:]
    run = train_run(fastest, tmp_path / "run", resume=True, report=quiet)
    assert seen == [("train_prefix", "eager"), ("evaluate", "sdpa")]
    assert Prefix.load(run.folder).card.content_hash == whole.prefix.card.content_hash


def test_what_was_chosen_may_be_damaged(fastest: Recipe, tmp_path: Path) -> None:
    def stop(what: str, done: int, *_: Any) -> None:
        if what == "training" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(fastest, tmp_path / "run", report=stop)
    (tmp_path / "run" / CHOSEN).write_text('{"chosen": "flashy"}')
    before = content(tmp_path / "run")
    with pytest.raises(ArtefactError, match=r"attention.json: damaged; delete it, and attention is timed again$"):
        train_run(fastest, tmp_path / "run", resume=True, report=quiet)
    assert content(tmp_path / "run") == before


def test_a_memory_budget_wants_an_attention_that_is_known(fastest: Recipe, tmp_path: Path) -> None:
    message = "^--memory-budget saves memory and model.attention=fastest time; set it to sdpa, or eager$"
    with pytest.raises(ConfigError, match=message):
        train_run(fastest, tmp_path / "run", memory_budget=10**9, report=quiet)


def test_layers_in_several_processes_cannot_be_timed() -> None:
    found = prefixkit("train", "positive-reviews", "model.attention=fastest", "model.shard=true", "--dry-run")
    assert found.returncode == 1
    assert "attention=fastest is timed in one process, and shard spreads layers; give sdpa or eager" in found.stderr
