"""A study finds a rate for every arm, runs every seed at it, and does nothing twice; what fails is in the results."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from prefixkit.cli.main import app
from prefixkit.config import Size, StudyConfig, load_study, study_names, study_text
from prefixkit.errors import ArtefactError, ConfigError, SweepError, TrainingError
from prefixkit.files import read_json, write_json
from prefixkit.lab.run.folder import BY_TEXT, RUN, locked
from prefixkit.lab.study.measures import DIVERGED, UNLEARNED
from prefixkit.lab.study.page import write_page
from prefixkit.lab.study.plan import Plan, Replicate, at_factor, plan_study, rates_of
from prefixkit.lab.study.results import STUDY, read_results
from prefixkit.lab.study.run import best_factor, finals_of, further_factor, run_study
from prefixkit.lab.sweep.plan import Trial
from prefixkit.lab.sweep.run import run_sweep
from prefixkit.lab.sweep.trial import SWEEP


def quiet(*_: object) -> None:
    """Say nothing."""


@pytest.fixture
def plan(study: StudyConfig, overrides: list[str], tmp_path: Path) -> Plan:
    return plan_study(study, tmp_path / "my studies" / "mine", size=Size.TINY, overrides=overrides)


@pytest.fixture
def small_plan(small_study: StudyConfig, overrides: list[str], tmp_path: Path) -> Plan:
    return plan_study(small_study, tmp_path / "small", size=Size.TINY, overrides=overrides)


def test_arms_rates_and_replicates_are_planned(plan: Plan) -> None:
    assert [arm.name for arm in plan.arms] == ["2 tokens", "4 tokens", "lora"]
    assert plan.replicates == (Replicate(0, 0), Replicate(1, 0))
    assert [arm.rates for arm in plan.arms] == [{"train.learning_rate": 0.01}] * 2 + [{"method.learning_rate": 0.002}]
    trial = plan.final(plan.arms[2], 3.0, plan.replicates[1])
    assert trial.recipe.method.learning_rate == 0.006
    assert trial.recipe.train.seed == 1
    tried = plan.search(plan.arms[2], 3.0)
    assert tried.folder == plan.final(plan.arms[2], 3.0, plan.replicates[0]).folder  # trained once, measured later
    assert tried.recipe.evaluation.samples == 0
    told_otherwise = plan_study(
        plan.study, plan.folder, size=Size.TINY, overrides=[*plan.overrides, "generation.batch_size=3"]
    )
    assert told_otherwise.search(told_otherwise.arms[2], 3.0).folder == tried.folder  # how it is measured is no matter
    longer = plan_study(plan.study, plan.folder, size=Size.TINY, overrides=[*plan.overrides, "train.steps=9"])
    assert longer.search(longer.arms[2], 3.0).folder != tried.folder


def test_a_hybrid_has_both_its_rates_scaled(study: StudyConfig, overrides: list[str], tmp_path: Path) -> None:
    recipe = plan_study(study, tmp_path, size=Size.TINY, overrides=[*overrides]).arms[2].recipe
    hybrid = recipe.model_copy(update={"method": recipe.method.model_copy(update={"beside_prefix": True})})
    assert rates_of(at_factor(hybrid, 0.3)) == {"train.learning_rate": 0.003, "method.learning_rate": 0.0006}


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"measure": "heldout_nil"}, [], 'study mine: no measure is called "heldout_nil"; did you mean "heldout_nll"?'),
        (
            {"settings": {"data.subset_seed": 1}},
            [],
            "study mine: data.subset_seed is counted up by the study itself; seeds says how many",
        ),
        ({}, ["train.seed=3"], "study mine: train.seed is counted up by the study itself; seeds says how many"),
        ({}, ["prefix.num_virtual_tokens=3"], "study mine: arms 2 tokens and 4 tokens are the same; leave one out"),
        ({}, ["train.step=3"], 'study mine, arm 2 tokens: train.step: unknown key; did you mean "steps"?'),
    ],
)
def test_a_wrong_plan_is_refused(
    study: StudyConfig, tmp_path: Path, changes: dict[str, str], overrides: list[str], message: str
) -> None:
    changed = study.model_copy(update=changes)
    with pytest.raises(ConfigError) as caught:
        plan_study(changed, tmp_path, size=Size.TINY, overrides=overrides)
    assert str(caught.value) == message


def test_each_task_has_its_baselines_measured_once_by_a_run_that_did_not_diverge(tmp_path: Path) -> None:
    plan = plan_study(load_study("tasks"), tmp_path, size=Size.TINY)
    rates = {arm.name: 1.0 for arm in plan.arms}

    def measured() -> list[tuple[str, int]]:
        finals = finals_of(plan, rates)
        return [(name, each.seed) for (name, each), trial in finals.items() if trial.recipe.evaluation.baselines]

    assert measured() == [("headlines, 5 tokens", 0), ("small talk, 5 tokens", 0)]
    diverged = finals_of(plan, rates)["headlines, 5 tokens", plan.replicates[0]].folder
    diverged.mkdir(parents=True)
    (diverged / RUN).write_text('{"diverged": "step 3: loss is nan"}')
    assert measured() == [("headlines, 5 tokens", 1), ("small talk, 5 tokens", 0)]


def test_draws_of_all_rows_are_refused(study: StudyConfig, tmp_path: Path) -> None:
    """Each would be the same run, and count as a repeat."""
    with pytest.raises(ConfigError) as caught:
        plan_study(study.model_copy(update={"subsets": 3}), tmp_path, size=Size.FULL)
    assert str(caught.value) == (
        "study mine: subsets draws data.train_rows of the rows, and arm 2 tokens learns from all of them; set "
        "data.train_rows, or leave subsets out"
    )


def test_another_recipe_is_for_arms_without_one_of_their_own(tmp_path: Path) -> None:
    plan = plan_study(load_study("length"), tmp_path, size=Size.TINY, recipe="bbc-headlines")
    assert plan.arms[0].recipe.data.source == "bbc-news"
    with pytest.raises(ConfigError, match="^study tasks: every arm has a recipe of its own; leave --recipe gpt2-imdb "):
        plan_study(load_study("tasks"), tmp_path, size=Size.TINY, recipe="gpt2-imdb")


@pytest.mark.parametrize(
    ("factors", "losses", "best", "further"),
    [
        ((0.3, 1.0, 3.0), (3.0, 2.0, 2.5), 1.0, None),
        ((0.3, 1.0, 3.0), (3.0, 2.5, 2.0), 3.0, 9.0),
        ((0.3, 1.0, 3.0), (2.0, 2.5, None), 0.3, 0.09),
        ((0.3, 1.0, 3.0, 9.0), (3.0, 2.5, 2.0, None), 3.0, None),
        ((1.0,), (None,), 1.0, None),
        ((0.3, 1.0), (None, None), None, None),
    ],
)
def test_the_rate_is_looked_for_until_it_is_at_no_end(
    factors: tuple[float, ...], losses: tuple[float | None, ...], best: float | None, further: float | None
) -> None:
    assert best_factor(factors, losses) == best
    assert further_factor(factors, losses) == further


def test_a_study_ends_in_results_and_runs_nothing_twice(plan: Plan, runner) -> None:  # type: ignore[no-untyped-def]
    result = run_study(plan, runner, report=quiet)
    assert [len(arm.trials) for arm in result.arms] == [2, 2, 2]
    for arm in result.arms:
        losses = {each.factor: each.validation_loss for each in arm.tried}
        assert len(losses) in (3, 4)
        assert losses[arm.factor] == min(losses.values())
        first = arm.trials[0].outcome
        assert {"heldout_nll", "seconds", "peak_memory_bytes", "validation_loss"} <= first.values.keys()
        assert len(first.items["heldout_nll"].influence) > 5
        assert first.values["validation_loss"] == losses[arm.factor]
        assert first.values[UNLEARNED] == 0.0
    assert {"base.heldout_nll", "real.fluency_ppl"} <= result.baselines("positive-reviews").keys()
    assert not any(arm.trials[0].outcome.others for arm in result.arms[1:])  # the baselines are measured once
    assert read_results(plan.folder) == result
    before = len(runner.ran)
    assert run_study(plan, runner, report=quiet).arms == result.arms
    assert len(runner.ran) == before


def test_scores_of_before_texts_were_kept_are_made_again(plan: Plan, runner) -> None:  # type: ignore[no-untyped-def]
    """Trained again is nothing; without each text's influence, nothing would be known of a difference."""
    result = run_study(plan, runner, report=quiet)
    before = len(runner.ran)
    trial = plan.final(plan.arms[1], result.arms[1].factor, plan.replicates[1])
    (trial.folder / BY_TEXT).unlink()
    again = run_study(plan, runner, report=quiet)
    assert len(runner.ran) == before + 1
    assert again.arms[1].trials[1].outcome.items == result.arms[1].trials[1].outcome.items
    assert again.arms[1].trials[1].outcome.values["seconds"] == result.arms[1].trials[1].outcome.values["seconds"]


def test_a_diverged_trial_is_counted_and_not_run_again(
    study: StudyConfig,
    overrides: list[str],
    tmp_path: Path,
    runner,  # type: ignore[no-untyped-def]
) -> None:
    """An absurd rate makes the loss explode, in the run itself."""
    wild = study.model_copy(update={"rates": [1.0], "arms": study.arms[:1]})
    settings = [*overrides, "train.learning_rate=1e9", "train.divergence.action=stop", "prefix.init.scaled=false"]
    plan = plan_study(wild, tmp_path / "wild", size=Size.TINY, overrides=settings)
    result = run_study(plan, runner, report=quiet)
    assert [arm.values(DIVERGED) for arm in result.arms] == [[1.0, 1.0], [1.0, 1.0]]
    assert all("lower train.learning_rate" in (outcome.error or "") for outcome in result.outcomes)
    before = len(runner.ran)
    run_study(plan, runner, report=quiet)
    assert len(runner.ran) == before
    assert "diverged" in write_page(plan.folder).read_text(encoding="utf-8")


def test_a_failed_trial_is_told_and_run_again(small_plan: Plan, runner) -> None:  # type: ignore[no-untyped-def]
    runner.fails = lambda trial: trial.seed == 1 and ("arm", "lora") in trial.settings
    result = run_study(small_plan, runner, report=quiet)
    assert result.arm("lora").trials[1].outcome.error == "it was told to"
    assert result.arm("lora").values("heldout_nll") == [result.arm("lora").trials[0].outcome.values["heldout_nll"]]
    runner.fails = lambda trial: False
    before = len(runner.ran)
    again = run_study(small_plan, runner, report=quiet)
    assert again.arm("lora").trials[1].outcome.error is None
    assert len(runner.ran) == before + 1


def test_a_study_without_its_data_ends_with_the_reason(
    small_study: StudyConfig, overrides: list[str], runner: Any, tmp_path: Path
) -> None:
    lost = [*overrides, f"data.source={tmp_path / 'lost.csv'}"]
    plan = plan_study(small_study, tmp_path / "small", size=Size.TINY, overrides=lost)
    with pytest.raises(SweepError, match=r"^none of 4 trials could begin; the first: .*lost\.csv"):
        run_study(plan, runner, report=quiet)
    assert len(runner.ran) == 4  # and none of the trials that were to count
    assert not (plan.folder / STUDY).exists()


def test_an_arm_whose_every_rate_fails_is_in_the_results(small_plan: Plan, runner) -> None:  # type: ignore[no-untyped-def]
    runner.fails = lambda trial: ("arm", "lora") in trial.settings
    result = run_study(small_plan, runner, report=quiet)
    assert result.arm("lora").factor is None
    assert {each.error for each in result.arm("lora").tried} == {"it was told to"}
    assert result.arm("lora").lost("heldout_nll") == 2
    assert result.arm("lora").values(DIVERGED) == []
    assert result.unfinished == ["it was told to"] * 2  # the rates; nothing could be run at none of them
    assert "no rate trained to its end" in write_page(small_plan.folder).read_text(encoding="utf-8")


def test_a_rate_that_failed_once_and_then_trained_is_not_held_against_its_run(small_plan: Plan, runner) -> None:  # type: ignore[no-untyped-def]
    failed: list[Path] = []

    def once(trial: Trial) -> bool:
        first = trial.folder not in failed and len(failed) < 3
        failed.append(trial.folder)
        return first

    runner.fails = once
    plan = plan_study(
        small_plan.study.model_copy(update={"extensions": 1}), small_plan.folder, size=Size.TINY,
        overrides=small_plan.overrides,
    )  # fmt: skip
    run_study(plan, runner, report=quiet)
    result = run_study(plan, runner, report=quiet)
    assert {arm.lost("heldout_nll") for arm in result.arms} == {0}


def test_a_study_does_not_write_over_a_sweep(small_plan: Plan, runner) -> None:  # type: ignore[no-untyped-def]
    small_plan.folder.mkdir()
    write_json(small_plan.folder / "sweep.json", {"trials": []})
    with pytest.raises(ConfigError, match="holds a sweep; give the study another --out"):
        run_study(small_plan, runner, report=quiet)


def test_runs_that_do_not_compare_are_marked(small_plan: Plan, runner) -> None:  # type: ignore[no-untyped-def]
    result = run_study(small_plan, runner, report=quiet)
    (hardware,) = {outcome.hardware for outcome in result.outcomes}
    assert hardware.endswith(", 1 thread")
    assert (result.mixed_hardware, result.mixed_data, result.mixed_versions) == ([], [], {})
    one = next(small_plan.folder.glob(f"2-tokens*seed1*/{RUN}"))
    write_json(one, read_json(one) | {"data_hash": "of other rows", "threads": 7, "versions": {"torch": "1.0"}})
    result = run_study(small_plan, runner, report=quiet)
    assert result.mixed_data == ["2 tokens"]
    assert result.mixed_hardware == sorted([hardware, hardware.replace("1 thread", "7 threads")])
    assert "1.0" in result.mixed_versions["torch"]
    page = write_page(small_plan.folder).read_text(encoding="utf-8")
    assert "did not all learn from the same rows" in page
    assert "ran on different processors or threads" in page
    assert "several versions of torch" in page


def test_draws_of_the_rows_come_with_every_seed(study: StudyConfig, overrides: list[str], tmp_path: Path) -> None:
    few = study.model_copy(update={"subsets": 2})
    plan = plan_study(few, tmp_path, size=Size.TINY, overrides=[*overrides, "data.train_rows=5"])
    assert plan.replicates == (Replicate(0, 0), Replicate(1, 0), Replicate(0, 1), Replicate(1, 1))
    assert plan.final(plan.arms[0], 1.0, plan.replicates[2]).recipe.data.subset_seed == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2}', '{"schema": 2, "study": {}}'])
def test_damaged_results_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / STUDY).write_text(text, encoding="utf-8")
    with pytest.raises(ArtefactError, match="damaged, not the results of a study; run the study again"):
        read_results(tmp_path)


def test_missing_and_other_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no such results; run the study first, `prefixkit study run NAME`"):
        read_results(tmp_path)
    (tmp_path / STUDY).write_text('{"schema": 99}', encoding="utf-8")
    with pytest.raises(ArtefactError, match="written by another version of prefixkit; run the study again"):
        read_results(tmp_path)


def test_the_command_runs_a_study_file_and_says_where_its_page_is(
    study: StudyConfig,
    overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[list[str]],
) -> None:
    """Through the command line, trials in processes of their own."""
    monkeypatch.chdir(tmp_path)
    written = study.model_copy(update={"rates": [1.0], "seeds": 1, "arms": study.arms[:1]}).model_dump(mode="json")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(written), encoding="utf-8")
    done = CliRunner().invoke(app, ["study", "run", str(path), "--size", "tiny", *overrides])
    assert done.exit_code == 0, done.output
    (page,) = (tmp_path / "studies").glob("mine-tiny-*/study.html")  # other settings, another folder
    assert f"page: {page}" in done.output
    assert page.is_file()
    assert len(started) == 2
    named = CliRunner().invoke(app, ["study", "report", "mine"])
    assert named.output.strip() == str(page.relative_to(tmp_path))
    again = CliRunner().invoke(app, ["study", "report"])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "studies" / "index.html").is_file()
    assert len(started) == 2


def test_the_command_lists_shows_and_plans() -> None:
    listed = CliRunner().invoke(app, ["study", "list", "--json"])
    assert {entry["name"] for entry in json.loads(listed.output)} == set(study_names())
    assert CliRunner().invoke(app, ["study", "show", "length"]).output == study_text("length")
    planned = CliRunner().invoke(app, ["study", "run", "length", "--dry-run"]).output.splitlines()
    assert planned[0] == "5 tokens: train.learning_rate 0.01; x1 x3; 3 replicates"
    assert len(planned) == 7


def test_reporting_on_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["study", "report"])
    assert isinstance(done.exception, ArtefactError)
    assert str(done.exception) == "studies: no results of a study; run one first, `prefixkit study run NAME`"
    for name in ("lenght", str(tmp_path / "lenght"), "elsewhere/lenght"):
        done = CliRunner().invoke(app, ["study", "report", name])
        assert str(done.exception) == f"{name}: no results of a study; run one first, `prefixkit study run NAME`"


def test_one_process_at_a_time_runs_studies_and_sweeps_in_a_folder(small_plan: Plan, runner) -> None:  # type: ignore[no-untyped-def]
    with locked(small_plan.folder):
        with pytest.raises(TrainingError, match=r": another process is working in it; wait for it, or stop it$"):
            run_study(small_plan, runner, report=quiet)
        with pytest.raises(TrainingError, match=r": another process is working in it; wait for it, or stop it$"):
            run_sweep([], small_plan.folder, runner, report=quiet)
    assert not runner.ran
    write_json(small_plan.folder / SWEEP, {"study": "mine"})
    with pytest.raises(ConfigError, match=r": holds a study; give the sweep another --out$"):
        run_sweep([], small_plan.folder, runner, report=quiet)
    assert read_json(small_plan.folder / SWEEP) == {"study": "mine"}
