"""What published studies came to, in short: shipped with prefixkit, for `prefixkit advise`."""

from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from prefixkit.files import read_json, write_json
from prefixkit.lab.study.results import ArmResult, StudyResult
from prefixkit.lab.study.statistics import difference, mean_of

_MEASURE = "heldout_nll"
FOUND = "found.json"


@dataclass(frozen=True)
class FoundArm:
    """One arm of a published study.

    Attributes:
        name: what its tables call it.
        x: its place on the study's axis.
        settings: what it sets.
        rates: the learning rates it was used at, by setting.
        mean: of the held-out loss, in nats per token.
        behind: how far that is above the best arm's, with its 95% interval; 0 for the best itself.
    """

    name: str
    x: float | None
    settings: dict[str, Any]
    rates: dict[str, float]
    mean: float
    behind: tuple[float, float, float]

    @property
    def is_as_good(self) -> bool:
        """Whether the best arm is not ahead of it beyond the interval."""
        return self.behind[1] <= 0


@dataclass(frozen=True)
class FoundStudy:
    """A published study of one recipe, as far as it trained to its end; a study of several is several of these.

    Attributes:
        name: its name.
        size: how much of it was run.
        recipe: that the arms learn from.
        format: of that recipe's data.
        tokens: of its texts at most.
        base_loss: of the base model alone on its test texts, in nats per token.
        arms: in its order.
    """

    name: str
    size: str
    recipe: str
    format: str
    tokens: int
    base_loss: float | None
    arms: tuple[FoundArm, ...]

    @property
    def best(self) -> FoundArm:
        """The arm with the lowest held-out loss."""
        return min(self.arms, key=lambda arm: arm.mean)


def summarise(result: StudyResult) -> list[FoundStudy]:
    """Return a study in short, recipe by recipe; nothing of one whose arms have no held-out loss to compare."""
    found = []
    for recipe, arms in result.recipes.items():
        means = {arm.name: mean.value for arm in arms if (mean := mean_of(arm, _MEASURE)) is not None}
        measured = [arm for arm in arms if arm.name in means]
        if not measured:
            continue
        best = min(measured, key=lambda arm: means[arm.name])
        found.append(
            FoundStudy(
                name=result.study.name,
                size=result.size,
                recipe=recipe,
                format=best.format,
                tokens=best.tokens,
                base_loss=result.baselines(recipe).get(f"base.{_MEASURE}"),
                arms=tuple(_arm(arm, best, means[arm.name]) for arm in measured),
            )
        )
    return found


def write_found(results: list[StudyResult], path: Path) -> None:
    """Write what studies came to, in short."""
    write_json(path, [asdict(study) for result in results for study in summarise(result)])


def read_found() -> list[FoundStudy]:
    """Return what the studies that ship with prefixkit came to."""
    with resources.as_file(resources.files("prefixkit") / "studies" / FOUND) as path:
        entries = read_json(path)
    return [FoundStudy(**entry | {"arms": tuple(map(_read_arm, entry["arms"]))}) for entry in entries]


def _read_arm(entry: dict[str, Any]) -> FoundArm:
    return FoundArm(**entry | {"behind": tuple(entry["behind"])})


def _arm(arm: ArmResult, best: ArmResult, mean: float) -> FoundArm:
    behind = (0.0, 0.0, 0.0)
    apart = None if arm is best else difference(arm, best, _MEASURE)
    if apart is not None and apart.interval is not None:
        behind = (apart.value, apart.interval.low, apart.interval.high)
    return FoundArm(arm.name, arm.x, arm.settings, arm.rates, mean, behind)
