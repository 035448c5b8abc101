"""Training learns, leaves the base model alone, resumes to the bit, and survives divergence and full disks."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixkit.config import Recipe, dump_recipe
from prefixkit.errors import DivergedError, TrainingError
from prefixkit.models.fingerprint import weights_hash
from prefixkit.prefix import PrefixStates
from prefixkit.training import checkpoint_folder, checkpoints, read_metrics, train_prefix, trainer
from prefixkit.training.monitor import Monitor

Load = Callable[[Recipe], Any]
Make = Callable[..., Recipe]


def measure(states: PrefixStates) -> float:
    return float(sum(site.key.square().mean() for site in states.sites))


def quiet(step: int, steps: int, words: str) -> None:
    """Report nothing."""


def test_the_loss_falls_and_the_base_model_does_not_move(make_recipe: Make, load: Load, tmp_path: Path) -> None:
    recipe = make_recipe(train={"steps": 40, "learning_rate": 0.05, "checkpoint_every": 100, "patience": None})
    base, data = load(recipe)
    before = weights_hash(base.model)
    train_prefix(base, data.train, recipe, tmp_path, measure=measure, report=quiet)
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 40
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.1
    assert weights_hash(base.model) == before
    assert base.model.config._attn_implementation == "sdpa"


def test_accumulated_small_batches_equal_one_large_batch(make_recipe: Make, load: Load, tmp_path: Path) -> None:
    settings = {"steps": 4, "learning_rate": 0.05}
    results = []
    for batch, accumulation in ((8, 1), (2, 4)):
        recipe = make_recipe(
            model={"dtype": "float64"}, prefix={"dropout": 0.0},
            train=settings | {"batch_size": batch, "accumulation": accumulation, "group_by_length": False},
        )  # fmt: skip
        base, data = load(recipe)
        folder = tmp_path / str(batch)
        folder.mkdir()
        results.append(train_prefix(base, data.train, recipe, folder, measure=lambda s: -measure(s), report=quiet))
    for one, other in zip(results[0].states.sites, results[1].states.sites, strict=True):
        torch.testing.assert_close(one.key, other.key, atol=1e-9, rtol=0)


def test_gradient_checkpointing_trains_the_same_prefix(make_recipe: Make, load: Load, tmp_path: Path) -> None:
    hashes = []
    for on in (False, True):
        recipe = make_recipe(model={"dtype": "float64"}, train={"gradient_checkpointing": on, "steps": 3})
        base, data = load(recipe)
        folder = tmp_path / str(on)
        folder.mkdir()
        outcome = train_prefix(base, data.train, recipe, folder, measure=lambda s: -measure(s), report=quiet)
        hashes.append(outcome.states)
    for one, other in zip(hashes[0].sites, hashes[1].sites, strict=True):
        torch.testing.assert_close(one.value, other.value, atol=1e-10, rtol=0)


@pytest.mark.parametrize("killed_at", [1, 5])
def test_a_run_killed_at_any_step_ends_in_the_same_prefix(make_recipe: Make, tmp_path: Path, killed_at: int) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(make_recipe(prefix={"reparam_depth": 2, "reparam_width": 8})), encoding="utf-8")

    def run(folder: str, last: int) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            str(Path(__file__).parent / "kill_me.py"),
            str(recipe),
            str(tmp_path / folder),
        ]
        return subprocess.run([*command, str(last)], capture_output=True, text=True, check=False)

    whole = run("whole", -1)
    assert whole.returncode == 0, whole.stderr
    killed = run("killed", killed_at)
    assert killed.returncode == -9
    resumed = run("killed", -1)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == whole.stdout
    steps = [line["step"] for line in read_metrics(tmp_path / "killed" / "metrics.jsonl")]
    assert steps == list(range(9))


def test_a_diverging_run_rolls_back_with_half_the_rate_and_ends(
    make_recipe: Make, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    base, data = load(recipe)
    check, failed = Monitor.check, []

    def fail_once(self: Monitor, step: int, loss: float, grad_norm: float) -> None:
        if step == 6 and not failed:
            failed.append(step)
            loss = float("nan")
        check(self, step, loss, grad_norm)

    monkeypatch.setattr(Monitor, "check", fail_once)
    outcome = train_prefix(base, data.train, recipe, tmp_path, measure=measure, report=quiet)
    rates = {line["step"]: line["learning_rate"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line}
    assert outcome.rollbacks == 1
    assert outcome.steps == 8
    assert rates[5] == pytest.approx(0.5 * recipe.train.learning_rate * 4 / 8, rel=0.2)
    assert rates[5] < 0.5 * rates[4]


def test_a_run_that_keeps_diverging_stops_and_says_so(
    make_recipe: Make, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(train={"divergence": {"max_rollbacks": 1}})
    base, data = load(recipe)
    monkeypatch.setattr(Monitor, "check", lambda *_: (_ for _ in ()).throw(DivergedError("step 1: loss is nan")))
    with pytest.raises(DivergedError, match=r"step 1: loss is nan \(gave up after 1 rollbacks\)"):
        train_prefix(base, data.train, recipe, tmp_path, measure=measure, report=quiet)
    assert base.model.config._attn_implementation == "sdpa"


def test_a_full_disk_keeps_the_previous_checkpoint(
    make_recipe: Make, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    base, data = load(recipe)
    write = trainer.write_own

    def full(folder: Path, *rest: Any) -> None:
        write(folder, *rest)
        if folder.name == "checkpoint-4":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "write_own", full)
    with pytest.raises(TrainingError, match=r"cannot save a checkpoint at step 4: .*No space left.* --resume"):
        train_prefix(base, data.train, recipe, tmp_path, measure=measure, report=quiet)
    assert [path.name for path in checkpoints(checkpoint_folder(tmp_path))] == ["checkpoint-2"]
    assert not (checkpoint_folder(tmp_path) / "unfinished").exists()


def test_early_stopping_keeps_the_best_prefix(make_recipe: Make, load: Load, tmp_path: Path) -> None:
    recipe = make_recipe(train={"steps": 30, "evaluate_every": 2, "patience": 3})
    base, data = load(recipe)
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.6, 3.7, 0.0])
    seen = []

    def scripted(states: PrefixStates) -> float:
        seen.append(states)
        return next(losses)

    outcome = train_prefix(base, data.train, recipe, tmp_path, measure=scripted, report=quiet)
    assert (outcome.best_step, outcome.best_loss, outcome.steps) == (4, 3.0, 10)
    assert torch.equal(outcome.states.sites[0].key, seen[2].sites[0].key)


def test_training_leaves_the_callers_random_numbers_alone(make_recipe: Make, load: Load, tmp_path: Path) -> None:
    recipe = make_recipe(train={"steps": 2})
    base, data = load(recipe)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train_prefix(base, data.train, recipe, tmp_path, measure=measure, report=quiet)
    assert torch.equal(torch.rand(3), expected)


def test_a_half_written_last_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 0}) + "\n" + '{"step": 1, "lo', encoding="utf-8")
    assert read_metrics(path) == [{"step": 0}]
