"""From a recipe and lists of values to trials, all checked before the first one runs."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from prefixkit.config import Recipe, dump_recipe, load_recipe
from prefixkit.errors import ConfigError

_LABEL_LENGTH = 80


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        settings: what distinguishes it from other trials but for the seed, key and value as they were typed.
        seed: the run's.
        recipe: the whole recipe.
        folder: the run folder; named after settings, seed and a hash of the recipe, so that another recipe never meets
            an old run.
    """

    settings: tuple[tuple[str, str], ...]
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def label(self) -> str:
        """Settings and seed, for people."""
        return label_of(self.settings, self.seed)


def label_of(settings: Sequence[tuple[str, str]], seed: int | None = None) -> str:
    """Write settings the short way: ``num_virtual_tokens=10 seed=0``."""
    parts = [f"{key.rpartition('.')[2]}={value}" for key, value in settings]
    return " ".join(parts if seed is None else [*parts, f"seed={seed}"])


def plan(name_or_path: str, grid: Sequence[str], *, seeds: int, folder: Path) -> list[Trial]:
    """Return every combination of the values, times the seeds.

    Args:
        name_or_path: of the recipe.
        grid: ``section.key=value,value,...`` texts; one value sets it in all trials.
        seeds: how many, counted up from the recipe's own.
        folder: where the trials' run folders go.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type or range, a key or a value is given twice.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds: expected at least 1, got {seeds}")
    choices = [_choices(entry) for entry in grid]
    keys = [key for key, _ in choices]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{key}: given twice; put all its values in one list")
        if key == "train.seed":
            raise ConfigError("train.seed: --seeds says how many seeds each combination gets; leave it out")
    varied = [len(values) > 1 for _, values in choices]
    trials = []
    for combination in product(*(values for _, values in choices)):
        pairs = list(zip(keys, combination, strict=True))
        first = load_recipe(name_or_path, [f"{key}={value}" for key, value in pairs])
        settings = tuple(pair for pair, is_varied in zip(pairs, varied, strict=True) if is_varied)
        for seed in range(first.train.seed, first.train.seed + seeds):
            recipe = first.model_copy(update={"train": first.train.model_copy(update={"seed": seed})})
            trials.append(Trial(settings, seed, recipe, folder / _name(settings, seed, recipe)))
    recipes = [trial.recipe for trial in trials]
    for trial in trials:
        if recipes.count(trial.recipe) > 1:
            raise ConfigError(f"{trial.label}: two values mean the same; leave one out")
    return trials


def _choices(entry: str) -> tuple[str, list[str]]:
    key, equals, raw = entry.partition("=")
    values = _cut(raw)
    if not equals or not key or not all(values):
        raise ConfigError(f"{entry}: expected key=value,value,... such as prefix.num_virtual_tokens=10,20,50")
    return key, values


def _cut(raw: str) -> list[str]:
    """Cut at the commas that stand in no bracket, brace or quoted value."""
    values, depth, quote = [""], 0, ""
    for letter in raw:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not values[-1].strip(" [{"):
            quote = letter
        elif letter == "," and depth == 0:
            values.append("")
            continue
        else:
            depth += (letter in "[{") - (letter in "]}")
        values[-1] += letter
    return [value.strip() for value in values]


def _name(settings: Sequence[tuple[str, str]], seed: int, recipe: Recipe) -> str:
    readable = re.sub(r"[^\w.=-]+", "_", label_of(settings, seed))[:_LABEL_LENGTH]
    return f"{readable}-{hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()[:8]}"
