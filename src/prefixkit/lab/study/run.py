"""Running a study: first a learning rate for every arm, then every seed at it. What is done is not done again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from prefixkit.config import Recipe, StudyConfig
from prefixkit.errors import ConfigError, SweepError
from prefixkit.evaluation import check_metrics
from prefixkit.files import write_json
from prefixkit.lab.run.folder import RUN, locked, read_record
from prefixkit.lab.study.measures import SHOWN
from prefixkit.lab.study.outcome import (
    Outcome,
    forget_old_scores,
    has_diverged,
    is_done,
    is_trained,
    read_outcome,
    validation_loss,
)
from prefixkit.lab.study.plan import Arm, Plan, Replicate, at_factor, rates_of
from prefixkit.lab.study.results import ArmResult, StudyResult, TrialResult, Tried, write_results
from prefixkit.lab.sweep.plan import Trial
from prefixkit.lab.sweep.trial import SWEEP, Result, Runner
from prefixkit.methods import check_installed
from prefixkit.models.hardware import describe_machine

_NOT_RUN = "not run: no rate trained to its end"
_SAMPLES = 3
"""Texts of each trial that the results keep."""

#: Told about progress: what is going on, trials done, trials in all, a few words.
Report = Callable[[str, int, int, str], None]


def run_study(plan: Plan, runner: Runner, *, report: Report) -> StudyResult:
    """Run a study, or what of it is missing.

    Args:
        plan: what to run.
        runner: where and how many trials at a time.
        report: told about progress.

    Returns:
        The results, which are also written to ``study.json`` in the study's folder. A trial that failed or diverged is
        in them as such.

    Raises:
        ConfigError: a metric's or method's package is missing, or the folder holds a sweep.
        SweepError: none of the trials could begin, so that the study itself is at fault: its model or data, say.
        TrainingError: another process is running a study in the folder.
        KeyboardInterrupt: Ctrl-C; the same study goes on where it was.
    """
    for arm in plan.arms:
        check_installed(arm.recipe.method.kind)
        check_metrics(arm.recipe)  # while rates are tried, none is measured
    with locked(plan.folder):
        return _run_study(plan, runner, report)


def _run_study(plan: Plan, runner: Runner, report: Report) -> StudyResult:
    if "trials" in read_record(plan.folder / SWEEP):
        raise ConfigError(f"{plan.folder}: holds a sweep; give the study another --out")
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_json(plan.folder / SWEEP, {"study": plan.study.name})  # what Ray's workers look for
    errors: dict[Path, str] = {}
    tried = {arm.name: arm.factors for arm in plan.arms}
    _search(plan, tried, runner, report, errors)
    for _ in range(plan.study.extensions):
        further = {arm.name: further_factor(tried[arm.name], _losses(plan, arm, tried[arm.name])) for arm in plan.arms}
        if not any(further.values()):
            break
        tried = {name: (*factors, *filter(None, [further[name]])) for name, factors in tried.items()}
        _search(plan, tried, runner, report, errors)
    best = {arm.name: best_factor(tried[arm.name], _losses(plan, arm, tried[arm.name])) for arm in plan.arms}
    for trial in finals_of(plan, best).values():
        forget_old_scores(trial)
    while missing := [trial for trial in finals_of(plan, best).values() if not is_done(trial)]:
        _run(missing, runner, lambda *told: report("training", *told), errors)
        if not any(has_diverged(trial.folder) for trial in missing):
            break  # else the baselines may have to be measured by another one
    result = _gather(plan, tried, best, errors)
    write_results(result, plan.folder)
    return result


def finals_of(plan: Plan, best: Mapping[str, float | None]) -> dict[tuple[str, Replicate], Trial]:
    """Return the trials that count; the first one of a recipe that has not diverged measures the baselines."""
    finals, measured = {}, set()
    for arm, replicate in product(plan.arms, plan.replicates):
        if (factor := best[arm.name]) is None:
            continue
        recipe, trial = plan.recipe_of(arm), plan.final(arm, factor, replicate)
        if recipe not in measured and not has_diverged(trial.folder):
            measured.add(recipe)
            trial = plan.final(arm, factor, replicate, with_baselines=True)
        finals[arm.name, replicate] = trial
    return finals


def best_factor(factors: Sequence[float], losses: Sequence[float | None]) -> float | None:
    """Return the factor with the lowest validation loss; a single one as it is; None where every one failed."""
    if len(factors) == 1:
        return factors[0]
    known = [(loss, factor) for factor, loss in zip(factors, losses, strict=True) if loss is not None]
    return min(known)[1] if known else None


def further_factor(factors: Sequence[float], losses: Sequence[float | None]) -> float | None:
    """Return the next factor to try where the best one is at an end of those tried; None where it is not.

    The step is the one between the two factors at that end.
    """
    best, ordered = best_factor(factors, losses), sorted(factors)
    if best is None or len(ordered) < 2 or best not in (ordered[0], ordered[-1]):
        return None
    step = ordered[0] / ordered[1] if best == ordered[0] else ordered[-1] / ordered[-2]
    return float(f"{best * step:.2g}")


def _search(
    plan: Plan, tried: Mapping[str, Sequence[float]], runner: Runner, report: Report, errors: dict[Path, str]
) -> None:
    """Try the rates that were not tried yet; an arm with a single one needs no trial."""
    searches = [plan.search(arm, factor) for arm in plan.arms for factor in tried[arm.name] if len(arm.factors) > 1]
    missing = [trial for trial in searches if not is_trained(trial.folder) and not has_diverged(trial.folder)]
    _run(missing, runner, lambda *told: report("trying rates", *told), errors)


def _losses(plan: Plan, arm: Arm, factors: Sequence[float]) -> list[float | None]:
    return [validation_loss(plan.search(arm, factor).folder) for factor in factors]


def _run(
    trials: Sequence[Trial], runner: Runner, told: Callable[[int, int, str], None], errors: dict[Path, str]
) -> None:
    """Run trials, and keep in `errors` the reasons of those that failed, by their folders."""
    done = 0

    def take(result: Result) -> None:
        nonlocal done
        done += 1
        errors.pop(result.trial.folder, None)  # it may have failed before
        if result.error is not None:
            errors[result.trial.folder] = result.error
        told(done, len(trials), result.trial.label if result.error is None else f"{result.trial.label}: {result.error}")

    if not trials:
        return
    told(0, len(trials), "")
    runner(trials, take)
    reasons = [errors.get(trial.folder) for trial in trials]
    if all(reasons) and not any((trial.folder / RUN).is_file() for trial in trials):  # written behind model and data
        raise SweepError(f"none of {len(trials)} trials could begin; the first: {reasons[0]}")


def _gather(
    plan: Plan, tried: dict[str, tuple[float, ...]], best: dict[str, float | None], errors: dict[Path, str]
) -> StudyResult:
    arms, finals = [], finals_of(plan, best)
    for arm in plan.arms:
        factor, factors = best[arm.name], sorted(tried[arm.name])
        rates = tuple(_tried(plan.search(arm, each), each, errors) for each in factors if len(factors) > 1)
        if factor is None:
            others = [Outcome.failed(_NOT_RUN, has_diverged=False)] * (len(plan.replicates) - 1)
            outcomes = [_without_a_rate(rates), *others]
        else:
            own = [finals[arm.name, replicate] for replicate in plan.replicates]
            kept = _items(plan.study)
            outcomes = [read_outcome(each, errors.get(each.folder), samples=_SAMPLES, items=kept) for each in own]
        arms.append(
            ArmResult(
                name=arm.name,
                x=arm.config.x,
                settings=dict(arm.config.settings),
                recipe=plan.recipe_of(arm),
                format=str(arm.recipe.data.format),
                tokens=arm.recipe.data.max_tokens,
                factor=factor,
                rates={} if factor is None else rates_of(at_factor(arm.recipe, factor)),
                tried=rates,
                at_edge=len(factors) > 1 and factor in (factors[0], factors[-1]),
                trials=tuple(map(TrialResult, plan.replicates, outcomes)),
            )
        )
    return StudyResult(
        study=plan.study,
        size=str(plan.size),
        recipe=plan.recipe,
        settings=plan.settings,
        overrides=plan.overrides,
        budget=_budget(plan),
        machine=asdict(describe_machine()),
        arms=tuple(arms),
    )


def _items(study: StudyConfig) -> set[str]:
    """Return the measures whose texts tell how sure they are: those a page shows, and those that are claimed about."""
    return {study.measure, *SHOWN, *(claim.measure for claim in study.claims)}


def _tried(trial: Trial, factor: float, errors: dict[Path, str]) -> Tried:
    loss = validation_loss(trial.folder)
    if loss is not None:
        return Tried(factor, loss, None, has_diverged=False)
    outcome = read_outcome(trial, errors.get(trial.folder), samples=0)
    return Tried(factor, None, outcome.error, has_diverged=outcome.has_diverged)


def _without_a_rate(tried: Sequence[Tried]) -> Outcome:
    """Return what the run of the first seed came to, at every rate: divergence, if that is how each of them ended."""
    reason = f"no rate trained to its end; the first: {tried[0].error}"
    return Outcome.failed(reason, has_diverged=all(each.has_diverged for each in tried))


def _rows_of(recipe: Recipe) -> str | int | None:
    rows = recipe.data.train_rows
    return f"{rows} of each label" if rows is not None and recipe.data.learn_also else rows


def _budget(plan: Plan) -> dict[str, Any]:
    """Return what every arm could spend; a setting that arms differ in is None."""
    recipes = [arm.recipe for arm in plan.arms]
    settings: dict[str, Any] = {
        "optimiser steps": [recipe.train.steps for recipe in recipes],
        "texts per step": [recipe.train.batch_size * recipe.train.accumulation for recipe in recipes],
        "tokens per text at most": [recipe.data.max_tokens for recipe in recipes],
        "training rows at most": [_rows_of(recipe) for recipe in recipes],
        "base model": [recipe.model.base for recipe in recipes],
        "data": [recipe.data.source for recipe in recipes],
    }
    return {name: values[0] if values.count(values[0]) == len(values) else None for name, values in settings.items()}
