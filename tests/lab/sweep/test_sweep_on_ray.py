"""Trials on a real Ray, started on this machine: `make test-ray`."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from prefixkit.errors import ConfigError
from prefixkit.lab.sweep import on_ray as module
from prefixkit.lab.sweep.on_ray import on_ray
from prefixkit.lab.sweep.plan import Trial, plan
from prefixkit.lab.sweep.run import run_sweep
from prefixkit.lab.sweep.trial import SWEEP, Result, run_here
from prefixkit.training import checkpoint_folder, checkpoints, read_metrics

ray = pytest.importorskip("ray", reason="Ray is an extra; `make test-ray` lays it over the environment")


@pytest.mark.usefixtures("ray_here")
def test_trials_run_on_ray_and_one_that_raises_costs_no_other(sweep_recipe: str, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    trials = plan(sweep_recipe, ["train.learning_rate=1e-2,1e30"], seeds=1, folder=folder)
    good, bad = run_sweep(trials, folder, on_ray(cores=1), report=lambda *_: None)
    assert good.error is None
    assert "heldout_nll" in good.scores
    assert bad.error is not None
    assert "step " in bad.error


@pytest.mark.usefixtures("ray_here")
def test_a_worker_that_is_lost_is_made_up_for(
    sweep_recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first time, the worker dies in the middle of the trial; Ray begins it again, from its checkpoint."""
    folder, wounded = tmp_path / "sweep", tmp_path / "wounded"
    (trial,) = plan(sweep_recipe, ["train.steps=6"], seeds=1, folder=folder)

    def run_and_die(trial: Trial) -> Result:
        from prefixkit.training.callbacks import Metrics

        append = Metrics._append

        def dying(self: Metrics, line: dict[str, Any]) -> None:
            append(self, line)
            if line["step"] == 4 and not wounded.exists():
                wounded.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        Metrics._append = dying  # type: ignore[method-assign]
        return run_here(trial)

    monkeypatch.setattr(module, "run_here", run_and_die)
    (result,) = run_sweep([trial], folder, on_ray(cores=1), report=lambda *_: None)
    assert wounded.exists()
    assert result.error is None
    assert [line["step"] for line in read_metrics(trial.folder / "metrics.jsonl")] == list(range(7))


@pytest.mark.usefixtures("ray_here")
def test_interrupting_a_sweep_ends_its_runs_with_a_checkpoint(sweep_recipe: str, tmp_path: Path) -> None:
    trials = plan(
        sweep_recipe, ["train.steps=2,5000", "train.checkpoint_every=5000"], seeds=1, folder=tmp_path / "sweep"
    )
    metrics = trials[1].folder / "metrics.jsonl"

    def interrupted(result: Result) -> None:
        while len(read_metrics(metrics)) < 3:
            time.sleep(0.05)
        raise KeyboardInterrupt

    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / SWEEP).write_text("{}")
    with pytest.raises(KeyboardInterrupt):
        on_ray(cores=1)(trials, interrupted)
    last = read_metrics(metrics)[-1]["step"]
    assert last < 5000
    assert checkpoints(checkpoint_folder(trials[1].folder))[-1].name == f"checkpoint-{last}"


def test_a_cluster_that_cannot_be_reached_is_named() -> None:
    ray.shutdown()
    with pytest.raises(
        ConfigError, match="^--address: cannot reach Ray at 127.0.0.1:1: Connection refused; is its head"
    ):
        on_ray("127.0.0.1:1")
