"""Results nobody measured, whose verdicts are known."""

from collections.abc import Sequence
from itertools import count
from typing import Any

from prefixkit.config import ClaimConfig, StudyConfig
from prefixkit.lab.study.measures import is_of_texts
from prefixkit.lab.study.outcome import Items, Outcome
from prefixkit.lab.study.plan import Replicate
from prefixkit.lab.study.results import ArmResult, StudyResult, TrialResult, Tried

_COUNTER = count(1)
VERSIONS = {"torch": "2.13.0", "prefixkit": "0.1.0"}


def outcome(values: dict[str, float], *, error: str | None = None, **details: Any) -> Outcome:
    """One trial's; its thousand texts move it next to nothing unless told otherwise."""
    little = 1e-13 * next(_COUNTER)
    items = {key: Items((little, -little) * 500, "a thousand texts") for key in values if is_of_texts(key)}
    known: dict[str, Any] = {"items": items, "others": {}, "samples": (), "versions": VERSIONS, "data_hash": "abc"}
    return Outcome(values=values, error=error, **known | details)


def arm(
    name: str,
    values: Sequence[float],
    measure: str = "heldout_nll",
    *,
    outcomes: Sequence[Outcome] | None = None,
    x: float | None = None,
    tried: Sequence[Tried] = (),
    at_edge: bool = False,
) -> ArmResult:
    """An arm with one run per value."""
    made = [outcome({measure: value}) for value in values] if outcomes is None else outcomes
    trials = tuple(TrialResult(Replicate(seed, 0), each) for seed, each in enumerate(made))
    rates = {"train.learning_rate": 0.01}
    return ArmResult(name, x, {}, "positive-reviews", "text", 40, 1.0, rates, tuple(tried), at_edge, trials)


def result(
    arms: Sequence[ArmResult], claims: Sequence[ClaimConfig], *, size: str = "teaching", **study: Any
) -> StudyResult:
    """A study's."""
    config = StudyConfig.model_validate(
        {"name": "made-up", "title": "Made up", "question": "Which is lower?", **study,
         "arms": [{"name": each.name, "x": each.x} for each in arms],
         "claims": [claim.model_dump() for claim in claims]}
    )  # fmt: skip
    machine = {"cpu": "abacus", "cores": 2, "memory_bytes": 10**9, "platform": "table", "accelerator": None}
    return StudyResult(
        config, size, "positive-reviews", {"train.steps": "24"}, (), {"optimiser steps": 24}, machine, tuple(arms)
    )
