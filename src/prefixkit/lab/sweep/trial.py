"""One trial: a run in a process of its own, so that none can take another down."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prefixkit.config import dump_recipe
from prefixkit.errors import PrefixkitError, SweepError
from prefixkit.files import write_text
from prefixkit.lab.run.folder import SCORES, is_measured, read_record
from prefixkit.lab.run.run import train_run
from prefixkit.lab.sweep.plan import Trial
from prefixkit.lab.sweep.processes import Processes
from prefixkit.parent import bound_to_me

#: The file of a sweep's folder that says what is in it.
SWEEP = "sweep.json"
_INTERRUPTED = 130


@dataclass(frozen=True)
class Result:
    """What became of a trial.

    Attributes:
        trial: which.
        scores: of the run; empty where it failed.
        error: why it failed; None where it did not.
    """

    trial: Trial
    scores: dict[str, float]
    error: str | None = None


#: Runs trials, in whatever order and place, and gives each result to the callback as it comes.
Runner = Callable[[Sequence[Trial], Callable[[Result], None]], None]


def run_apart(trial: Trial, processes: Processes, threads: int | None = None) -> Result:
    """Run a trial, or go on with it, by `prefixkit train` in a process of its own; a finished one is not run again.

    Args:
        trial: which.
        processes: that it is one of while it runs.
        threads: that its process may compute with; None for all there are.

    Raises:
        KeyboardInterrupt: Ctrl-C; the run saved a checkpoint first.
    """
    return _told(trial, lambda: _scores_of_process(trial, processes, threads))


def run_here(trial: Trial) -> Result:
    """Do the same in this process: one that Ray has made for the trial, on a machine that may be another."""
    home = trial.folder.parent
    if not (home / SWEEP).is_file():
        return Result(trial, {}, f"{home}: cannot be seen from here; give --out on a disk that all machines share")
    return _told(trial, lambda: train_run(trial.recipe, trial.folder, resume=True, report=lambda *_: None).scores)


def _told(trial: Trial, run: Callable[[], dict[str, float]]) -> Result:
    """Return the scores of a finished run, or what running it gives; whatever goes wrong is told."""
    try:
        finished = finished_scores(trial)
        return Result(trial, run() if finished is None else finished)
    except (PrefixkitError, OSError) as error:
        return Result(trial, {}, " ".join(str(error).split()))


def _scores_of_process(trial: Trial, processes: Processes, threads: int | None) -> dict[str, float]:
    recipe, log = (trial.folder.with_name(f"{trial.folder.name}{ending}") for ending in (".yaml", ".log"))
    write_text(recipe, dump_recipe(trial.recipe))
    command = [sys.executable, "-m", "prefixkit", "train", str(recipe), "--out", str(trial.folder), "--resume"]
    environ = bound_to_me(os.environ if threads is None else os.environ | {"OMP_NUM_THREADS": str(threads)})
    with log.open("a", encoding="utf-8") as stderr:
        status = processes.run(command, environ, stderr)
    if status == _INTERRUPTED and processes.is_ending:
        raise KeyboardInterrupt
    if status == _INTERRUPTED:
        raise SweepError("its process was told to end, by another than this one; it goes on from its checkpoint")
    if status < 0:
        raise SweepError(f"its process was killed (signal {-status})")
    scores = finished_scores(trial)
    if status or scores is None:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise SweepError(lines[-1].removeprefix("error: ") if lines else "it left no scores, and said nothing")
    return scores


def finished_scores(trial: Trial) -> dict[str, float] | None:
    """Return the scores of a trial's run, None where it is not at its end."""
    if not is_measured(trial.folder, trial.recipe):
        return None
    scores: dict[str, Any] = read_record(trial.folder / SCORES)
    return {key: value for key, value in scores.items() if isinstance(value, int | float)}


def to_json(result: Result) -> dict[str, Any]:
    """Return a result as a sweep's file keeps it."""
    trial = result.trial
    entry: dict[str, Any] = {"settings": dict(trial.settings), "seed": trial.seed, "folder": trial.folder.name}
    return entry | ({"scores": result.scores} if result.error is None else {"error": result.error})
