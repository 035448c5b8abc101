"""What published studies came to, in short: shipped with prefixkit, for `prefixkit advise`."""

from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from prefixkit.config import load_recipe
from prefixkit.files import read_json, write_json
from prefixkit.lab.study.claims import LEAST_REPEATS
from prefixkit.lab.study.results import ArmResult, StudyResult
from prefixkit.lab.study.statistics import difference, mean_of

_MEASURE = "heldout_nll"
_SCALED = "prefix.init.scaled"
#: Nats per token that an arm as good as the best may be behind it.
_MARGIN = 0.02
FOUND = "found.json"


@dataclass(frozen=True)
class FoundArm:
    """One arm of a published study.

    Attributes:
        name: what its tables call it.
        x: its place on the study's axis.
        settings: what it sets.
        rates: the learning rates it was used at, by setting.
        is_scaled: whether those are in units of each layer (`prefix.init.scaled`).
        mean: of the held-out loss, in nats per token.
        behind: how far that is above that of the best arm of the axis, or where there is no axis of all, with its 95%
            interval; 0 for the best itself, None where there is nothing to tell it by.
    """

    name: str
    x: float | None
    settings: dict[str, Any]
    rates: dict[str, float]
    is_scaled: bool
    mean: float
    behind: tuple[float, float, float] | None

    @property
    def is_as_good(self) -> bool:
        """Whether the best arm is not shown to be ahead, and shown to be ahead by no more than the margin."""
        return self.behind is not None and self.behind[1] <= 0 and self.behind[2] <= _MARGIN


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
    def placed(self) -> list[FoundArm]:
        """The arms on the study's axis."""
        return [arm for arm in self.arms if arm.x is not None]


def summarise(result: StudyResult) -> list[FoundStudy]:
    """Return a study in short, recipe by recipe; nothing of one whose arms have no held-out loss to compare.

    Arms that lost a run are left out: the runs that came through are the lucky ones.
    """
    found = []
    for recipe, arms in result.recipes.items():
        whole = [arm for arm in arms if not arm.lost(_MEASURE)]
        means = {arm.name: mean.value for arm in whole if (mean := mean_of(arm, _MEASURE)) is not None}
        measured = [arm for arm in whole if arm.name in means]
        if not measured:
            continue
        placed = [arm for arm in measured if arm.x is not None]
        best = min(placed or measured, key=lambda arm: means[arm.name])
        found.append(
            FoundStudy(
                name=result.study.name,
                size=result.size,
                recipe=recipe,
                format=best.format,
                tokens=best.tokens,
                base_loss=result.baselines(recipe).get(f"base.{_MEASURE}"),
                arms=tuple(_arm(result, arm, best, means[arm.name]) for arm in measured),
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
    behind = entry["behind"]
    return FoundArm(**entry | {"behind": None if behind is None else tuple(behind)})


def _arm(result: StudyResult, arm: ArmResult, best: ArmResult, mean: float) -> FoundArm:
    return FoundArm(arm.name, arm.x, arm.settings, arm.rates, _is_scaled(result, arm), mean, _behind(arm, best))


def _behind(arm: ArmResult, best: ArmResult) -> tuple[float, float, float] | None:
    if arm is best:
        return (0.0, 0.0, 0.0)
    apart = difference(arm, best, _MEASURE)
    if apart is None or apart.interval is None or apart.repeats < LEAST_REPEATS:
        return None
    return (apart.value, apart.interval.low, apart.interval.high)


def _is_scaled(result: StudyResult, arm: ArmResult) -> bool:
    settings = {**result.settings, **dict(each.split("=", 1) for each in result.overrides), **arm.settings}
    said = settings.get(_SCALED)
    return load_recipe(arm.recipe).prefix.init.scaled if said is None else str(said).lower() == "true"
