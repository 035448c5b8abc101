"""A whole sweep: run what is missing, keep every result as it comes, and sum up over the seeds."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefixkit.errors import ConfigError, SweepError
from prefixkit.evaluation.intervals import Interval, mean_interval
from prefixkit.files import write_json
from prefixkit.lab.run.folder import RUN, locked, read_record
from prefixkit.lab.sweep.plan import Trial
from prefixkit.lab.sweep.trial import SWEEP, Result, Runner, to_json
from prefixkit.models.hardware import describe_machine


@dataclass(frozen=True)
class Group:
    """The trials of one combination of settings.

    Attributes:
        settings: what they have in common.
        values: the measure of each run that has it, by seed.
        failed: how many did not.
    """

    settings: tuple[tuple[str, str], ...]
    values: tuple[float, ...]
    failed: int

    @property
    def mean(self) -> float | None:
        """Over the seeds; None where none finished."""
        return float(np.mean(self.values)) if self.values else None

    @property
    def interval(self) -> Interval | None:
        """95% of the mean over seeds (Student's t); None below two."""
        return mean_interval(self.values)


def run_sweep(
    trials: Sequence[Trial], folder: Path, runner: Runner, *, report: Callable[[int, int, str], None]
) -> list[Result]:
    """Run the trials; what is finished already is not run again.

    Args:
        trials: of one plan.
        folder: the sweep's; every result is written to ``sweep.json`` there as it comes, beside those of other plans.
        runner: where and how many at a time.
        report: told about progress: how many are done, of how many, and a few words.

    Returns:
        One result per trial, in their order; failed ones say why.

    Raises:
        ConfigError: the folder holds a study.
        TrainingError: another sweep is running in it.
        KeyboardInterrupt: Ctrl-C; the same sweep goes on where it was.
    """
    with locked(folder):
        return _run(trials, folder, runner, report)


def _run(
    trials: Sequence[Trial], folder: Path, runner: Runner, report: Callable[[int, int, str], None]
) -> list[Result]:
    if "study" in read_record(folder / SWEEP):
        raise ConfigError(f"{folder}: holds a study; give the sweep another --out")
    results: dict[Path, Result] = {}
    before = {entry["folder"]: entry for entry in read_record(folder / SWEEP).get("trials", ())}
    planned = [trial.folder.name for trial in trials]
    others = [entry for name, entry in before.items() if name not in planned]

    def keep() -> None:
        known = before | {path.name: to_json(result) for path, result in results.items()}
        ordered = [known[name] for name in planned if name in known]
        machine = asdict(describe_machine())
        write_json(folder / SWEEP, {"machine": machine, "planned": len(trials), "trials": [*others, *ordered]})

    def done(result: Result) -> None:
        results[result.trial.folder] = result
        keep()
        words = result.trial.label if result.error is None else f"{result.trial.label} failed: {result.error}"
        report(len(results), len(trials), words)

    folder.mkdir(parents=True, exist_ok=True)
    keep()
    runner(trials, done)
    return [results[trial.folder] for trial in trials]


def sum_up(results: Sequence[Result], metric: str) -> list[Group]:
    """Return one group per combination of settings, in their order.

    Raises:
        ConfigError: no run has this measure.
        SweepError: runs that should differ in their seed alone learned from other data, or on other base weights.
    """
    known = {key for result in results for key in result.scores}
    if known and metric not in known:
        raise ConfigError(f"--metric: no run has {metric}; they have {', '.join(sorted(known))}")
    groups: dict[tuple[tuple[str, str], ...], list[Result]] = {}
    for result in results:
        groups.setdefault(result.trial.settings, []).append(result)
    for members in groups.values():
        _check_alike(members)
    return [
        Group(
            settings,
            tuple(result.scores[metric] for result in members if metric in result.scores),
            sum(result.error is not None for result in members),
        )
        for settings, members in groups.items()
    ]


def summary(groups: Sequence[Group], metric: str) -> list[dict[str, Any]]:
    """Return the groups as JSON keeps them."""
    return [
        {
            "settings": dict(group.settings),
            "metric": metric,
            "mean": group.mean,
            "interval": None if group.interval is None else [group.interval.low, group.interval.high],
            "values": list(group.values),
            "failed": group.failed,
        }
        for group in groups
    ]


def _check_alike(members: Sequence[Result]) -> None:
    """Refuse to take runs together between which the data or the base model changed."""
    for what, key in (("data", "data_hash"), ("base weights", "base_weights_hash")):
        known = {str(read_record(each.trial.folder / RUN)[key]): each.trial.folder.name for each in members
                 if each.error is None and key in read_record(each.trial.folder / RUN)}  # fmt: skip
        if len(known) > 1:
            first, second = list(known.values())[:2]
            raise SweepError(f"{first} and {second} have other {what} than each other; sweep again with another --out")
