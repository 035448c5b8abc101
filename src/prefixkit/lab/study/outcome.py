"""What became of a trial, read from its run folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixkit.config import Recipe
from prefixkit.lab.pages.comparison import is_number
from prefixkit.lab.run.folder import ROW_LOSSES, RUN, SAMPLES, SCORES, is_measured, read_record
from prefixkit.lab.study.measures import COSTS, DIVERGED, UNLEARNED
from prefixkit.lab.sweep.plan import Trial

_SYSTEM = "prefix"


@dataclass(frozen=True)
class Items:
    """A measure text by text, so that two arms can be compared on the same texts.

    Attributes:
        parts: what is summed, per text.
        weights: by what the sum is divided, per text.
    """

    parts: tuple[float, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """One trial's results.

    Attributes:
        values: by measure: scores, and what training cost.
        items: some of them text by text.
        others: scores of the baselines, where this trial measured them.
        samples: the first texts it wrote.
        versions: of the libraries it ran with.
        data_hash: of what it learned from.
        error: why there is less; None where there is not.
        hardware: processor and threads it ran with; empty where that is not known.
    """

    values: dict[str, float]
    items: dict[str, Items]
    others: dict[str, float]
    samples: tuple[str, ...]
    versions: dict[str, str]
    data_hash: str | None
    error: str | None
    hardware: str = ""

    @classmethod
    def failed(cls, reason: str, *, has_diverged: bool) -> "Outcome":
        """Return what there is of a trial without scores; one that failed otherwise says nothing about divergence."""
        return cls({DIVERGED: 1.0} if has_diverged else {}, {}, {}, (), {}, None, reason)

    @property
    def has_diverged(self) -> bool:
        """Whether loss or gradient left the rails for good."""
        return self.values.get(DIVERGED) == 1.0


def is_trained(folder: Path) -> bool:
    """Whether a run's training is at its end."""
    return "content_hash" in read_record(folder / RUN)


def has_diverged(folder: Path) -> bool:
    """Whether it ended because it diverged; that is a result, and it would end so again."""
    return "diverged" in read_record(folder / RUN)


def validation_loss(folder: Path) -> float | None:
    """Return the lowest held-out loss on validation rows; None where training is not at its end."""
    loss = read_record(folder / RUN).get("best_heldout_loss")
    return float(loss) if is_trained(folder) and is_number(loss) else None


def is_done(trial: Trial) -> bool:
    """Whether a trial that counts needs no more running."""
    return has_diverged(trial.folder) or (is_trained(trial.folder) and is_measured(trial.folder, trial.recipe))


def read_outcome(trial: Trial, error: str | None, *, samples: int) -> Outcome:
    """Read what a trial left.

    Args:
        trial: which.
        error: why its process failed; None where it did not.
        samples: texts to keep at most.
    """
    run = read_record(trial.folder / RUN)
    diverged = run.get("diverged")
    if diverged is not None or not is_done(trial):
        reason = diverged or error or "it did not come to its end; run the study again"
        return Outcome.failed(reason, has_diverged=diverged is not None)
    scores = {key: value for key, value in read_record(trial.folder / SCORES).items() if is_number(value)}
    texts = _texts(trial.folder)
    items = _row_losses(trial.folder)
    if hits := [float(bool(line["is_wanted"])) for line in texts if line.get("is_wanted") is not None]:
        items["sentiment_accuracy"] = Items(tuple(hits), (1.0,) * len(hits))
    return Outcome(
        values={key: float(value) for key, value in scores.items() if "." not in key} | _costs(run, trial.recipe),
        items=items,
        others={key: float(value) for key, value in scores.items() if "." in key},
        samples=tuple(line["text"] for line in texts[:samples]),
        versions=dict(run["versions"]),
        data_hash=run["data_hash"],
        error=None,
        hardware=_hardware(run),
    )


def _hardware(run: dict[str, Any]) -> str:
    machine = run["machine"]
    processor = machine["accelerator"] or f"{machine['cores']} cores of {machine['cpu']}"
    return f"{processor}, {run['threads']} {'thread' if run['threads'] == 1 else 'threads'}"


def _costs(run: dict[str, Any], recipe: Recipe) -> dict[str, float]:
    costs = {cost.key: float(run[cost.key]) for cost in COSTS if is_number(run.get(cost.key))}
    costs |= {DIVERGED: 0.0, "trainable_parameters": float(run["trainable_parameters"])}
    costs[UNLEARNED] = float(run["best_step"] == 0)
    costs["seconds_per_step"] = run["seconds"] / max(1, run["steps"])
    if is_number(loss := run.get("best_heldout_loss")):
        costs["validation_loss"] = float(loss)
    return costs


def _row_losses(folder: Path) -> dict[str, Items]:
    rows = read_record(folder / ROW_LOSSES).get("heldout_nll")
    return {} if rows is None else {"heldout_nll": Items(tuple(rows["nats"]), tuple(map(float, rows["tokens"])))}


def _texts(folder: Path) -> list[dict[str, Any]]:
    path = folder / SAMPLES
    if not path.is_file():
        return []
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
    return [line for line in lines if line["system"] == _SYSTEM]
