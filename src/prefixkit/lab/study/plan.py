"""From a study to its trials: every arm, at every learning rate that is tried, with every seed and draw of the data."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from prefixkit.config import (
    ArmConfig,
    ClaimTest,
    EvaluationConfig,
    Method,
    Recipe,
    Size,
    StudyConfig,
    arm_recipe,
    as_overrides,
    size_settings,
)
from prefixkit.errors import ConfigError, did_you_mean
from prefixkit.lab.pages.comparison import Better
from prefixkit.lab.study.measures import known_measures
from prefixkit.lab.sweep.plan import Trial
from prefixkit.methods import rate_of

#: Settings that tell replicates apart.
_COUNTED = ("train.seed", "data.subset_seed")
#: All that a trial is measured on while rates are tried: its validation loss is what counts, and training gives that.
_BARELY = EvaluationConfig(heldout_rows=1, contrast_rows=0, samples=0, baselines=False, judge=False)


@dataclass(frozen=True)
class Replicate:
    """One repetition of every arm.

    Attributes:
        seed: of training.
        subset: of the draw of training rows, `data.subset_seed`.
    """

    seed: int
    subset: int


@dataclass(frozen=True)
class Arm:
    """One arm, ready to be trained.

    Attributes:
        config: as the study has it.
        recipe: its whole recipe, at its default rates and the first seed.
        factors: on those rates, the ones to try first.
    """

    config: ArmConfig
    recipe: Recipe
    factors: tuple[float, ...]

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.config.name

    @property
    def rates(self) -> dict[str, float]:
        """Its default learning rates, by setting."""
        return rates_of(self.recipe)


@dataclass(frozen=True)
class Plan:
    """A study whose recipes are all known to be right.

    Attributes:
        study: as it is written.
        size: how much of it is run.
        recipe: name or path of the recipe of the arms that have none of their own.
        overrides: settings for all arms that came from the command line.
        arms: in the study's order.
        replicates: of every arm.
        folder: where the run folders and the results go.
    """

    study: StudyConfig
    size: Size
    recipe: str
    overrides: tuple[str, ...]
    arms: tuple[Arm, ...]
    replicates: tuple[Replicate, ...]
    folder: Path

    @property
    def settings(self) -> dict[str, str]:
        """What the size and the study set in every arm's recipe."""
        return as_overrides(size_settings(self.size)) | as_overrides(self.study.settings)

    def recipe_of(self, arm: Arm) -> str:
        """Return name or path of the recipe an arm learns from."""
        return arm.config.recipe or self.recipe

    def search(self, arm: Arm, factor: float) -> Trial:
        """Return the trial that tries a rate: the first replicate, barely measured."""
        recipe = self._at(arm, factor, self.replicates[0])
        return self._trial(arm, factor, self.replicates[0], recipe.model_copy(update={"evaluation": _BARELY}))

    def final(self, arm: Arm, factor: float, replicate: Replicate, *, with_baselines: bool = False) -> Trial:
        """Return a trial that counts. One of each recipe measures the baselines, which its arms share."""
        recipe = self._at(arm, factor, replicate)
        evaluation = recipe.evaluation.model_copy(update={"baselines": with_baselines})
        return self._trial(arm, factor, replicate, recipe.model_copy(update={"evaluation": evaluation}))

    def _at(self, arm: Arm, factor: float, replicate: Replicate) -> Recipe:
        recipe = at_factor(arm.recipe, factor)
        train = recipe.train.model_copy(update={"seed": replicate.seed})
        data = recipe.data.model_copy(update={"subset_seed": replicate.subset})
        return recipe.model_copy(update={"train": train, "data": data})

    def _trial(self, arm: Arm, factor: float, replicate: Replicate, recipe: Recipe) -> Trial:
        settings = (("arm", arm.name), ("rate", f"x{factor:g}"), ("subset", str(replicate.subset)))
        shown = settings if len({each.subset for each in self.replicates}) > 1 else settings[:2]
        return Trial(shown, replicate.seed, recipe, self.folder / _folder_name(arm, factor, replicate, recipe))


def plan_study(
    study: StudyConfig,
    folder: Path,
    *,
    size: Size,
    recipe: str | None = None,
    overrides: Iterable[str] = (),
    seeds: int | None = None,
) -> Plan:
    """Return a study's plan.

    Args:
        study: what to run.
        folder: the study's folder.
        size: how much of it.
        recipe: another recipe than the study's, for arms without one of their own.
        overrides: ``section.key=value`` texts for all arms.
        seeds: another number of seeds than the study's.

    Raises:
        ConfigError: a setting is wrong, two arms are the same, or a claim is about a measure there is none of.
    """
    overrides = tuple(overrides)
    written = [
        key for settings in (study.settings, *(arm.settings for arm in study.arms)) for key in as_overrides(settings)
    ]
    for key in (*written, *(override.partition("=")[0] for override in overrides)):
        if key in _COUNTED:
            raise ConfigError(f"study {study.name}: {key} is counted up by the study itself; seeds says how many")
    _check_measures(study)
    if recipe is not None and all(config.recipe for config in study.expanded_arms()):
        raise ConfigError(f"study {study.name}: every arm has a recipe of its own; leave --recipe {recipe} out")
    arms: list[Arm] = []
    for config in study.expanded_arms():
        made = arm_recipe(study, config, size=size, recipe=recipe, overrides=overrides)
        for other in arms:
            if other.recipe == made and other.config.rates == config.rates:
                raise ConfigError(
                    f"study {study.name}: arms {other.name} and {config.name} are the same; leave one out"
                )
        arms.append(Arm(config, made, tuple(sorted(config.rates or study.rates))))
    first, drawn = arms[0].recipe.train.seed, range(study.subsets)
    if study.subsets > 1 and (whole := next((arm.name for arm in arms if arm.recipe.data.train_rows is None), None)):
        raise ConfigError(
            f"study {study.name}: subsets draws data.train_rows of the rows, and arm {whole} learns from all of them; "
            "set data.train_rows, or leave subsets out"
        )
    count = study.seeds if seeds is None else seeds
    if count < 1:
        raise ConfigError(f"--seeds: expected at least 1, got {count}")
    replicates = [Replicate(seed, subset) for subset, seed in product(drawn, range(first, first + count))]
    return Plan(study, size, recipe or study.recipe, overrides, tuple(arms), tuple(replicates), folder)


def rates_of(recipe: Recipe) -> dict[str, float]:
    """Return the learning rates a recipe trains with, by setting."""
    rates = {}
    if recipe.method.has_prefix:
        rates["train.learning_rate"] = recipe.train.learning_rate
    if recipe.method.kind not in (Method.PREFIX, Method.INFIX):
        rates["method.learning_rate"] = rate_of(recipe.method)
    return rates


def at_factor(recipe: Recipe, factor: float) -> Recipe:
    """Return a recipe with all its learning rates times a factor."""
    rates = {key: float(f"{rate * factor:.6g}") for key, rate in rates_of(recipe).items()}
    changes = {
        section: getattr(recipe, section).model_copy(update={"learning_rate": rates[key]})
        for section in ("train", "method")
        if (key := f"{section}.learning_rate") in rates
    }
    return recipe.model_copy(update=changes)


def _check_measures(study: StudyConfig) -> None:
    claimed = [measure for values in (study.claimed.values if study.claimed else {}).values() for measure in values]
    for measure in (study.measure, *(claim.measure for claim in study.claims), *claimed):
        if measure not in known_measures():
            hint = did_you_mean(measure, known_measures())
            raise ConfigError(f'study {study.name}: no measure is called "{measure}"{hint or "; see docs/studies.md"}')
    for claim in study.claims:
        is_compared = claim.test in (ClaimTest.BETTER, ClaimTest.ORDERED)
        if is_compared and known_measures()[claim.measure].better is Better.NEITHER:
            raise ConfigError(
                f"study {study.name}: neither more nor less of {claim.measure} is better; test a value or ratio"
            )


def _folder_name(arm: Arm, factor: float, replicate: Replicate, recipe: Recipe) -> str:
    """Name a run folder after what is trained; how that is measured may change and meets the same folder."""
    trained = recipe.model_dump_json(exclude={"evaluation", "generation"})
    digest = hashlib.sha256(trained.encode()).hexdigest()[:8]
    readable = re.sub(r"[^\w.-]+", "-", arm.name).strip("-")
    return f"{readable}-x{factor:g}-seed{replicate.seed}-draw{replicate.subset}-{digest}"
