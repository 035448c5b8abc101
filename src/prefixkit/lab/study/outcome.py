"""What became of a trial, read from its run folder."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixkit.config import Recipe
from prefixkit.lab.pages.comparison import is_number
from prefixkit.lab.run.folder import BY_TEXT, RUN, SAMPLES, SCORES, is_measured, read_record
from prefixkit.lab.study.measures import COSTS, DIVERGED, UNLEARNED
from prefixkit.lab.sweep.plan import Trial

_SYSTEM = "prefix"


@dataclass(frozen=True)
class Items:
    """How far each text moves a measure, so that two arms can be compared on the same texts.

    Attributes:
        influence: of each text, or group of them; 0 in sum. See `prefixkit.evaluation.intervals`.
        texts: what the texts are known by: those of two runs are the same where this is.
    """

    influence: tuple[float, ...]
    texts: str


@dataclass(frozen=True)
class Outcome:
    """One trial's results.

    Attributes:
        values: by measure: scores, and what training cost.
        items: those that are of texts, text by text.
        others: scores of the baselines, where this trial measured them.
        samples: the first texts it wrote.
        versions: of the libraries it ran with.
        data_hash: of what it learned from.
        error: why there is less; None where there is not.
        hardware: processor and threads it ran with; empty where that is not known.
        base_hash: of the base model's weights; None where that is not known.
        rows_hash: of the rows it learned from, in whatever order; None where that is not known.
    """

    values: dict[str, float]
    items: dict[str, Items]
    others: dict[str, float]
    samples: tuple[str, ...]
    versions: dict[str, str]
    data_hash: str | None
    error: str | None
    hardware: str = ""
    base_hash: str | None = None
    rows_hash: str | None = None

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


def forget_old_scores(trial: Trial) -> None:
    """Let a trial be measured again whose scores were made before their texts were kept."""
    if not (trial.folder / BY_TEXT).is_file():
        (trial.folder / SCORES).unlink(missing_ok=True)


def read_outcome(trial: Trial, error: str | None, *, samples: int, items: Collection[str] = ()) -> Outcome:
    """Read what a trial left.

    Args:
        trial: which.
        error: why its process failed; None where it did not.
        samples: texts to keep at most.
        items: measures to keep text by text.
    """
    run = read_record(trial.folder / RUN)
    diverged = run.get("diverged")
    if diverged is not None or not is_done(trial):
        reason = diverged or error or "it did not come to its end; run the study again"
        return Outcome.failed(reason, has_diverged=diverged is not None)
    scores = {key: value for key, value in read_record(trial.folder / SCORES).items() if is_number(value)}
    texts, by_text = _texts(trial.folder), read_record(trial.folder / BY_TEXT)
    known = by_text.get("influences", {})
    return Outcome(
        values={key: float(value) for key, value in scores.items() if "." not in key} | _costs(run, trial.recipe),
        items={key: Items(tuple(known[key]), by_text["texts"]) for key in items if key in known},
        others={key: float(value) for key, value in scores.items() if "." in key},
        samples=tuple(line["text"] for line in texts[:samples]),
        versions=dict(run["versions"]),
        data_hash=run["data_hash"],
        error=None,
        hardware=_hardware(run),
        base_hash=run["base_weights_hash"]["before"],
        rows_hash=run.get("rows_hash"),
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


def _texts(folder: Path) -> list[dict[str, Any]]:
    path = folder / SAMPLES
    if not path.is_file():
        return []
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
    return [line for line in lines if line["system"] == _SYSTEM]
