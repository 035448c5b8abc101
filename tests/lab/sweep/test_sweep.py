"""Sweeps: a process for every trial; failures are told and cost no other trial, and nothing runs twice."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixkit.config import validate_recipe
from prefixkit.errors import ConfigError, SweepError
from prefixkit.evaluation.intervals import mean_interval
from prefixkit.files import read_json
from prefixkit.lab.sweep.local import on_this_machine
from prefixkit.lab.sweep.on_ray import on_ray
from prefixkit.lab.sweep.plan import Trial, _cut, plan
from prefixkit.lab.sweep.processes import Processes
from prefixkit.lab.sweep.run import run_sweep, sum_up, summary
from prefixkit.lab.sweep.trial import Result, run_here
from prefixkit.training import read_metrics


def quiet(*_: Any) -> None:
    """Say nothing."""


def test_every_combination_is_planned_with_every_seed(sweep_recipe: str, tmp_path: Path) -> None:
    grid = ["prefix.num_virtual_tokens=2,5", "prefix.layers=[0],[0,1]", "train.steps=4"]
    trials = plan(sweep_recipe, grid, seeds=2, folder=tmp_path)
    assert [trial.label for trial in trials] == [
        f"num_virtual_tokens={tokens} layers={layers} seed={seed}"
        for tokens in (2, 5) for layers in ("[0]", "[0,1]") for seed in (0, 1)
    ]  # fmt: skip
    assert {trial.recipe.train.steps for trial in trials} == {4}
    assert [trial.recipe.prefix.num_virtual_tokens for trial in trials] == [2] * 4 + [5] * 4
    assert len({trial.folder for trial in trials}) == 8
    other = plan(sweep_recipe, [*grid[:2], "train.steps=5"], seeds=2, folder=tmp_path)
    assert not {trial.folder for trial in trials} & {trial.folder for trial in other}  # another recipe, other folders


@pytest.mark.parametrize(
    ("grid", "seeds", "message"),
    [
        (
            ["prefix.num_virtual_token=2,5"],
            1,
            'prefix.num_virtual_token: unknown key; did you mean "num_virtual_tokens"?',
        ),
        (["prefix.num_virtual_tokens=2,none"], 1, "prefix.num_virtual_tokens: "),
        (
            ["prefix.num_virtual_tokens"],
            1,
            "prefix.num_virtual_tokens: expected key=value,value,... such as prefix.num",
        ),
        (["train.steps=2,,3"], 1, "train.steps=2,,3: expected key=value,value,..."),
        (["train.steps=2", "train.steps=3"], 1, "train.steps: given twice; put all its values in one list"),
        (["train.learning_rate=1e-2,0.01"], 1, "learning_rate=1e-2 seed=0: two values mean the same; leave one out"),
        (["train.seed=1,2"], 1, "train.seed: --seeds says how many seeds each combination gets; leave it out"),
        (["train.steps=2"], 0, "--seeds: expected at least 1, got 0"),
    ],
)
def test_a_grid_with_a_mistake_is_refused_before_anything_runs(
    grid: list[str], seeds: int, message: str, sweep_recipe: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(sweep_recipe, grid, seeds=seeds, folder=tmp_path / "sweep")
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "sweep").exists()


def test_a_failed_trial_is_told_and_the_others_go_on_and_nothing_runs_twice(
    sweep_recipe: str, tmp_path: Path, started: list[list[str]]
) -> None:
    folder = tmp_path / "sweep"
    trials = plan(sweep_recipe, ["train.learning_rate=1e-2,1e30"], seeds=2, folder=folder)
    told: list[tuple[int, int, str]] = []
    results = run_sweep(trials, folder, on_this_machine(2), report=lambda *words: told.append(words))
    assert [result.trial for result in results] == trials
    assert [result.error is None for result in results] == [True, True, False, False]
    assert all("step " in str(result.error) for result in results[2:])  # of the divergence
    assert [done for done, _, _ in told] == [1, 2, 3, 4]
    good, bad = sum_up(results, "heldout_nll")
    assert good.values == tuple(result.scores["heldout_nll"] for result in results[:2])
    assert good.values[0] != good.values[1]  # the seeds differ
    assert good.interval == mean_interval(good.values)
    assert (bad.mean, bad.interval, bad.failed) == (None, None, 2)
    kept = read_json(folder / "sweep.json")
    assert kept["planned"] == 4
    assert [entry.get("error") is None for entry in kept["trials"]] == [True, True, False, False]
    assert summary([good], "heldout_nll")[0]["settings"] == {"train.learning_rate": "1e-2"}
    record = read_json(trials[1].folder / "run.json")  # as where the file was mended between the two
    (trials[1].folder / "run.json").write_text(json.dumps(record | {"data_hash": "another"}))
    first, second = (trial.folder.name for trial in trials[:2])
    with pytest.raises(SweepError, match=f"^{first} and {second} have other data than each other; sweep again with an"):
        sum_up(results, "heldout_nll")
    started.clear()
    again = run_sweep(trials[:2], folder, on_this_machine(), report=quiet)
    assert started == []
    assert [result.scores for result in again] == [result.scores for result in results[:2]]
    with pytest.raises(ConfigError, match="--metric: no run has bleu; they have .*heldout_nll"):
        sum_up(results, "bleu")


def test_a_trial_that_was_killed_goes_on_from_its_checkpoint(
    sweep_recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[list[str]]
) -> None:
    folder = tmp_path / "sweep"
    (whole,) = plan(sweep_recipe, ["train.steps=6"], seeds=1, folder=folder / "whole")
    (trial,) = plan(sweep_recipe, ["train.steps=6"], seeds=1, folder=folder)
    expected = run_sweep([whole], folder / "whole", on_this_machine(), report=quiet)[0]
    monkeypatch.setenv("PREFIXKIT_TEST_DIES_AT", "4")
    killed = run_sweep([trial], folder, on_this_machine(), report=quiet)[0]
    assert killed.error == f"its process was killed (signal {signal.SIGKILL})"
    assert [line["step"] for line in read_metrics(trial.folder / "metrics.jsonl")] == list(range(5))
    monkeypatch.delenv("PREFIXKIT_TEST_DIES_AT")
    done = run_sweep([trial], folder, on_this_machine(), report=quiet)[0]
    assert done.scores == expected.scores


def test_interrupting_a_sweep_ends_its_runs_with_a_checkpoint(sweep_recipe: str, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    trials = plan(sweep_recipe, ["train.steps=100000", "train.patience=null"], seeds=2, folder=folder)
    log = trials[0].folder.with_name(f"{trials[0].folder.name}.log")
    main = threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's workers ignore it

    def interrupt_once_it_trains() -> None:
        deadline = time.monotonic() + 90
        while len(read_metrics(trials[0].folder / "metrics.jsonl")) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        signal.pthread_kill(main.ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt_once_it_trains).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_sweep(trials, folder, on_this_machine(), report=quiet)
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(trials[0].folder.glob("training/checkpoints/checkpoint-*"))
    assert "interrupted; go on with --resume" in log.read_text()
    assert not trials[1].folder.exists()


def test_a_trial_told_to_end_by_another_costs_no_other_trial(
    sweep_recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a machine does that runs out of memory: SIGTERM to one process, which exits as after Ctrl-C."""
    monkeypatch.setattr(Processes, "run", lambda *_: 130)
    trials = plan(sweep_recipe, ["train.steps=6"], seeds=2, folder=tmp_path / "sweep")
    results = run_sweep(trials, tmp_path / "sweep", on_this_machine(), report=quiet)
    assert [result.error for result in results] == [
        "its process was told to end, by another than this one; it goes on from its checkpoint"
    ] * 2


def test_results_outlive_a_sweep_that_is_started_again_and_stopped(sweep_recipe: str, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    trials = plan(sweep_recipe, ["train.steps=6"], seeds=2, folder=folder)
    run_sweep(trials, folder, lambda some, done: [done(Result(each, {"m": 1.0})) for each in some], report=quiet)  # type: ignore[arg-type,return-value]

    def stopped(some: Any, done: Any) -> None:
        done(Result(some[1], {}, "out of memory"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(trials, folder, stopped, report=quiet)
    kept = read_json(folder / "sweep.json")["trials"]
    assert [entry["seed"] for entry in kept] == [0, 1]
    assert (kept[0]["scores"], kept[1]["error"]) == ({"m": 1.0}, "out of memory")


def test_interrupting_spares_commands_that_did_not_begin(tmp_path: Path) -> None:
    running = Processes()
    running.interrupt()
    with (tmp_path / "log").open("w") as log, pytest.raises(KeyboardInterrupt):
        running.run([sys.executable, "-c", "raise SystemExit"], {}, log)


def test_a_damaged_run_costs_no_other_trial_its_result(
    sweep_recipe: str, tmp_path: Path, started: list[list[str]]
) -> None:
    folder = tmp_path / "sweep"
    trials = plan(sweep_recipe, ["train.steps=4"], seeds=2, folder=folder)
    trials[0].folder.mkdir(parents=True)
    (trials[0].folder / "scores.json").write_text("{")
    damaged, good = run_sweep(trials, folder, on_this_machine(), report=quiet)
    assert "damaged, not a JSON object" in str(damaged.error)
    assert good.error is None
    other = plan(sweep_recipe, ["train.steps=5"], seeds=1, folder=folder)
    run_sweep(other, folder, on_this_machine(), report=quiet)
    assert len(read_json(folder / "sweep.json")["trials"]) == 3  # those of the first plan are kept


def test_a_measure_that_some_runs_lack_is_summed_up_over_the_others() -> None:
    one, other = (Trial((), seed, validate_recipe({}), Path("x")) for seed in (0, 1))
    (group,) = sum_up([Result(one, {"m": 3.0, "n": 1.0}), Result(other, {"n": 1.0})], "m")
    assert (group.values, group.failed) == ((3.0,), 0)


@pytest.mark.parametrize(
    ("raw", "values"),
    [
        ("1,2", ["1", "2"]),
        ("[[0,1],[2]],[3]", ["[[0,1],[2]]", "[3]"]),
        ("it's fine,that's good", ["it's fine", "that's good"]),
        ("'a, b',c", ["'a, b'", "c"]),
        ("['a]',b],{x: 1}", ["['a]',b]", "{x: 1}"]),
    ],
)
def test_commas_inside_a_value_belong_to_it(raw: str, values: list[str]) -> None:
    assert _cut(raw) == values


def test_a_machine_that_does_not_see_the_folder_says_so(sweep_recipe: str, tmp_path: Path) -> None:
    (trial,) = plan(sweep_recipe, ["train.steps=6"], seeds=1, folder=tmp_path / "elsewhere")
    assert run_here(trial).error == (
        f"{tmp_path / 'elsewhere'}: cannot be seen from here; give --out on a disk that all machines share"
    )


@pytest.mark.parametrize(("workers", "threads"), [(1, None), (2, 3), (8, 1)])
def test_trials_share_the_threads_there_are_and_no_more(
    workers: int, threads: int | None, sweep_recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixkit.models.hardware.usable_cores", lambda: 16)
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    given = []

    def run(trial: Trial, processes: Processes, threads: int | None) -> Result:
        given.append(threads)
        return Result(trial, {})

    monkeypatch.setattr("prefixkit.lab.sweep.local.run_apart", run)
    on_this_machine(workers)(plan(sweep_recipe, [], seeds=2, folder=tmp_path), lambda _: None)
    assert given == [threads, threads]


def test_fewer_than_one_at_a_time_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^--workers: expected at least 1, got 0$"):
        on_this_machine(0)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    with pytest.raises(ConfigError, match=r"^--cores: expected at least 1, got 0$"):
        on_ray(cores=0)


def test_without_ray_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'^--on ray: Ray is not installed; pip install "prefixkit\[ray\]"$'):
        on_ray()


def test_the_command_sums_up_and_exits_1_where_a_trial_failed(
    sweep_recipe: str, tmp_path: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from prefixkit.cli.failing import run_app
    from prefixkit.cli.main import app

    monkeypatch.chdir(tmp_path)
    command = ["sweep", sweep_recipe, "train.learning_rate=1e-2,2e-2"]
    assert run_app(app, [*command, "--seeds", "2", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "learning_rate=2e-2 seed=1"
    assert run_app(app, [*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["folder"] == str(tmp_path / "sweeps" / "tiny")
    assert [group["settings"] for group in told["groups"]] == [
        {"train.learning_rate": "1e-2"}, {"train.learning_rate": "2e-2"},
    ]  # fmt: skip
    assert run_app(app, ["sweep", sweep_recipe, "train.learning_rate=1e-2,1e30"]) == 1
    out, err = capsys.readouterr()
    assert "heldout_nll" in out
    assert (
        err.strip().splitlines()[-1].startswith("error: 1 of 2 trials failed; the first, learning_rate=1e30 seed=0: ")
    )


def test_students_interval_of_a_mean() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert found is not None
    assert (found.low, found.high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6)
    assert mean_interval([1.0]) is None
    trial = Trial((), 0, validate_recipe({}), Path("x"))
    assert sum_up([Result(trial, {"m": 3.0})], "m")[0].interval is None


def test_the_module_that_trials_start_is_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "prefixkit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip()
