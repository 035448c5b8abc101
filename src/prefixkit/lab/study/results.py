"""The results of a study as ``study.json`` keeps them: every trial with its values, and where they come from."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prefixkit.config import StudyConfig
from prefixkit.errors import ArtefactError
from prefixkit.evaluation import Ratio
from prefixkit.files import read_json, write_json
from prefixkit.lab.study.outcome import Items, Outcome
from prefixkit.lab.study.plan import Replicate

STUDY = "study.json"
_SCHEMA = 2


@dataclass(frozen=True)
class TrialResult:
    """One trial that counts."""

    replicate: Replicate
    outcome: Outcome


@dataclass(frozen=True)
class Tried:
    """One learning rate that was tried: its factor, and the validation loss it came to; None where it failed."""

    factor: float
    validation_loss: float | None
    error: str | None
    has_diverged: bool


@dataclass(frozen=True)
class ArmResult:
    """One arm.

    Attributes:
        name: what tables call it.
        x: its place on the axis; None where it has none.
        settings: what it sets.
        recipe: name or path of what it learns from.
        format: of that recipe's data.
        tokens: of its texts at most.
        factor: on its default rates, the one that was used; None where none of them trained to its end.
        rates: the learning rates that makes, by setting.
        tried: every factor that was tried.
        at_edge: whether the factor used is the least or the greatest of several that were tried: a better one may lie
            beyond.
        trials: in the order of the replicates.
    """

    name: str
    x: float | None
    settings: dict[str, Any]
    recipe: str
    format: str
    tokens: int
    factor: float | None
    rates: dict[str, float]
    tried: tuple[Tried, ...]
    at_edge: bool
    trials: tuple[TrialResult, ...]

    def lost(self, measure: str) -> int:
        """Return how many runs lack a measure: they diverged or failed, or what they wrote cannot be measured."""
        return sum(measure not in trial.outcome.values for trial in self.trials)

    @property
    def untried(self) -> list[Tried]:
        """Learning rates whose run failed, and not because it diverged: a better one may be among them."""
        return [each for each in self.tried if each.validation_loss is None and not each.has_diverged]

    @property
    def same_data(self) -> tuple[str, ...]:
        """What arms have in common that are to learn from the same rows."""
        own = {key: value for key, value in self.settings.items() if key.startswith(("data.", "model."))}
        return self.recipe, *(f"{key}={value}" for key, value in sorted(own.items()))

    @property
    def same_base(self) -> tuple[str, ...]:
        """What arms have in common that are to have the same base model."""
        return self.recipe, *(each for each in self.same_data[1:] if each.startswith("model."))

    def values(self, measure: str) -> list[float]:
        """Return a measure of every trial that has it, in the order of the replicates."""
        found = [trial.outcome.values.get(measure) for trial in self.trials]
        return [value for value in found if value is not None]


@dataclass(frozen=True)
class StudyResult:
    """What came out of a study.

    Attributes:
        study: as it was written.
        size: how much of it was run.
        recipe: name or path of the recipe of the arms that have none of their own.
        settings: what the size and the study set in every arm's recipe.
        overrides: what the command line did.
        budget: what every arm could spend, by name.
        machine: where it was gathered.
        arms: in the study's order.
    """

    study: StudyConfig
    size: str
    recipe: str
    settings: dict[str, str]
    overrides: tuple[str, ...]
    budget: dict[str, Any]
    machine: dict[str, Any]
    arms: tuple[ArmResult, ...]

    def arm(self, name: str) -> ArmResult:
        """Return an arm by its name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def outcomes(self) -> list[Outcome]:
        """Every trial's, of all arms."""
        return [trial.outcome for arm in self.arms for trial in arm.trials]

    @property
    def recipes(self) -> dict[str, list[ArmResult]]:
        """The arms by the recipe they learn from."""
        found: dict[str, list[ArmResult]] = {}
        for arm in self.arms:
            found.setdefault(arm.recipe, []).append(arm)
        return found

    def baselines(self, recipe: str) -> dict[str, float]:
        """Return the scores of what no arm trained, by the keys of scores.json.

        Args:
            recipe: on whose texts they were measured.
        """
        outcomes = (trial.outcome for arm in self.recipes[recipe] for trial in arm.trials)
        return next((outcome.others for outcome in outcomes if outcome.others), {})

    @property
    def unfinished(self) -> list[str]:
        """Why runs, rates that were tried among them, did not come to their end: those that did not diverge."""
        trained = [arm for arm in self.arms if arm.factor is not None]
        outcomes = [trial.outcome for arm in trained for trial in arm.trials]
        finals = [outcome.error for outcome in outcomes if not outcome.has_diverged]
        tried = [each.error for arm in self.arms for each in arm.untried]
        return [error for error in (*finals, *tried) if error is not None]

    @property
    def mixed_data(self) -> list[str]:
        """Arms with runs that learned from other rows than most that were to have the same: the data changed."""
        return self._mixed(lambda outcome: outcome.data_hash, by_draw=True)

    @property
    def mixed_base(self) -> list[str]:
        """Arms with runs on other weights than most that were to have the same base model."""
        return self._mixed(lambda outcome: outcome.base_hash, by_draw=False)

    def _mixed(self, hash_of: Callable[[Outcome], str | None], *, by_draw: bool) -> list[str]:
        hashes: dict[tuple[Any, ...], list[tuple[str, str]]] = {}
        for arm in self.arms:
            for trial in arm.trials:
                if (found := hash_of(trial.outcome)) is not None:
                    group = (*arm.same_data, trial.replicate.subset) if by_draw else arm.same_base
                    hashes.setdefault(group, []).append((arm.name, found))
        others = []
        for runs in hashes.values():
            ((usual, _),) = Counter(found for _, found in runs).most_common(1)
            others += [name for name, found in runs if found != usual]
        return list(dict.fromkeys(others))

    @property
    def mixed_hardware(self) -> list[str]:
        """Processors and numbers of threads the trials had, where those differ: times then do not compare."""
        found = sorted({outcome.hardware for outcome in self.outcomes if outcome.hardware})
        return found if len(found) > 1 else []

    @property
    def mixed_versions(self) -> dict[str, list[str]]:
        """Libraries of which the trials used several versions, and which."""
        found: dict[str, set[str]] = {}
        for outcome in self.outcomes:
            for library, version in outcome.versions.items():
                found.setdefault(library, set()).add(version)
        return {library: sorted(versions) for library, versions in found.items() if len(versions) > 1}


def write_results(result: StudyResult, folder: Path) -> Path:
    """Write ``study.json`` and return its path."""
    path = folder / STUDY
    write_json(path, {"schema": _SCHEMA, **asdict(result), "study": result.study.model_dump(mode="json")})
    return path


def read_results(path: Path) -> StudyResult:
    """Read ``study.json``.

    Args:
        path: the file, or the folder it is in.

    Raises:
        ArtefactError: there is none, it is damaged, or another prefixkit wrote it.
    """
    path = path / STUDY if path.is_dir() else path
    if not path.is_file():
        raise ArtefactError(f"{path}: no such results; run the study first, `prefixkit study run NAME`")
    try:
        found = read_json(path)
        if found.pop("schema") != _SCHEMA:
            raise ArtefactError(f"{path}: written by another version of prefixkit; run the study again")
        found |= {"study": StudyConfig.model_validate(found["study"]), "overrides": tuple(found["overrides"])}
        return StudyResult(**found | {"arms": tuple(map(_arm, found["arms"]))})
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError):
        raise ArtefactError(f"{path}: damaged, not the results of a study; run the study again") from None


def _arm(values: dict[str, Any]) -> ArmResult:
    tried = tuple(Tried(**each) for each in values["tried"])
    trials = tuple(TrialResult(Replicate(**each["replicate"]), _outcome(each["outcome"])) for each in values["trials"])
    return ArmResult(**values | {"tried": tried, "trials": trials})


def _outcome(values: dict[str, Any]) -> Outcome:
    items = {key: _items(each) for key, each in values["items"].items()}
    return Outcome(**values | {"items": items, "samples": tuple(values["samples"])})


def _items(values: dict[str, Any]) -> Items:
    if "influence" in values:
        return Items(tuple(values["influence"]), values["texts"])
    # results of before: parts of a ratio, whose weights tell which texts they are of
    ratio = Ratio(tuple(values["parts"]), tuple(values["weights"]))
    return Items(tuple(ratio.influence.tolist()), f"weights {ratio.weights}")
