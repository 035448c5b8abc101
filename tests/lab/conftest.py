"""A run on a tiny model, trained in a second."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pytest

import processes
from prefixkit.config import Recipe, dump_recipe, validate_recipe
from prefixkit.lab.run.run import Run, train_run
from prefixkit.lab.sweep.processes import Processes
from prefixkit.prefix import Prefix

#: Leaves the run of a recipe in a folder.
TrainOnce = Callable[[Recipe, Path], Run]

WORDS = "the film was wonderful great dull i loved it and story".split()


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """A Ray on this machine, with two cores."""
    ray = pytest.importorskip("ray", reason="Ray is an extra; `make test-ray` lays it over the environment")
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


def quiet(*_: Any) -> None:
    """Say nothing."""


def write_reviews(path: Path, *, last_word: str = "") -> Path:
    rows = [{"text": " ".join(WORDS[(i + k) % 11] for k in range(4 + i % 7)) + f" {i}{last_word}", "label": "ab"[i % 2]}
            for i in range(80)]  # fmt: skip
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what recipes read, the same for all tests: a path is part of a recipe."""
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture
def reviews(inputs: Path) -> Path:
    """Rows as they were, whatever a test before made of them."""
    return write_reviews(inputs / "my reviews.jsonl")


@pytest.fixture
def recipe(reviews: Path, tiny_llama_dir: Path) -> Recipe:
    """A recipe that trains in a second."""
    return validate_recipe(
        {
            "name": "tiny",
            "model": {"base": str(tiny_llama_dir), "dtype": "float32"},
            "prefix": {"num_virtual_tokens": 3},
            "data": {"source": str(reviews), "label_column": "label", "keep_label": "a", "prompt": "the film"},
            "train": {"steps": 4, "batch_size": 4, "evaluate_every": 2, "checkpoint_every": 2, "threads": 1},
            "evaluation": {"samples": 2, "judge": False, "heldout_rows": 4, "contrast_rows": 2, "bootstrap": 100,
                           "instruction": "be kind"},
            "generation": {"max_new_tokens": 4},
        }
    )  # fmt: skip


@pytest.fixture(scope="session")
def train_once(tmp_path_factory: pytest.TempPathFactory) -> TrainOnce:
    """Leaves the run of a recipe in a folder: trained for the first test that asks, copied for the others."""
    trained: dict[str, Run] = {}

    def leave(recipe: Recipe, folder: Path) -> Run:
        key = recipe.model_dump_json()
        if key not in trained:
            trained[key] = train_run(recipe, tmp_path_factory.mktemp("trained") / "run", report=quiet)
        shutil.copytree(trained[key].folder, folder)
        return dataclasses.replace(
            trained[key], folder=folder, prefix=Prefix.load(folder), report=folder / "report.html"
        )

    return leave


@pytest.fixture
def run(recipe: Recipe, tmp_path: Path, train_once: TrainOnce) -> Run:
    return train_once(recipe, tmp_path / "run")


@pytest.fixture
def sweep_recipe(recipe: Recipe, tmp_path: Path) -> str:
    """The file of a recipe that trains in a second, and gives up where it diverges."""
    values = recipe.model_dump(mode="json")
    values["train"] |= {"steps": 6, "evaluate_every": 3, "checkpoint_every": 1, "threads": None}
    values["train"]["divergence"]["action"] = "stop"
    values["evaluation"] |= {"samples": 0, "instruction": None}
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_recipe(validate_recipe(values), only_changes=True), encoding="utf-8")
    return str(path)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let trials run in processes forked from one that has imported everything; the commands that were started."""
    commands: list[list[str]] = []

    def run(self: Processes, command: list[str], environ: Mapping[str, str], stderr: IO[str]) -> int:
        assert command[:3] == [sys.executable, "-m", "prefixkit"]
        commands.append(command[3:])
        done = processes.run(processes.prefixkit_main, *command[3:], environ=dict(environ))
        stderr.write(done.stderr)
        return done.returncode

    monkeypatch.setattr(Processes, "run", run)
    return commands
