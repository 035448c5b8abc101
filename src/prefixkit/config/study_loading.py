"""From a study's YAML file to a `StudyConfig`, and from a study to the recipes of its arms."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from prefixkit.config.explaining import explain
from prefixkit.config.loading import draft_recipe, load_recipe, parse_yaml, recipe_text
from prefixkit.config.recipe import Recipe
from prefixkit.config.shipped import shipped_names, shipped_text, text_of
from prefixkit.config.study import ArmConfig, Size, StudyConfig
from prefixkit.config.unread import unread
from prefixkit.errors import ConfigError

_FOLDER, _SIZES = "studies", "sizes"


def study_names() -> list[str]:
    """Return the names of the studies that ship with prefixkit."""
    return [name for name in shipped_names(_FOLDER) if name != _SIZES]


def load_study(name_or_path: str) -> StudyConfig:
    """Read a study.

    Args:
        name_or_path: a YAML file, or the name of a shipped study.

    Raises:
        ConfigError: there is no such study, a key is unknown, or a value has the wrong type or range; the message
            starts with the path of the field.
    """
    values = parse_yaml(study_text(name_or_path), name_or_path)
    if not isinstance(values, dict):
        raise ConfigError(f"{name_or_path}: expected keys such as `arms:`, got {type(values).__name__}")
    try:
        return StudyConfig.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        known = "see a shipped one, `prefixkit study show length`,"
        raise ConfigError(f"{name_or_path}: {explain(error, StudyConfig, known)}") from None


def study_text(name_or_path: str) -> str:
    """Return a study's text as it is written.

    Raises:
        ConfigError: there is no such study.
    """
    return text_of(name_or_path, _FOLDER, study_names(), what="study", listed_by="prefixkit study list")


def size_settings(size: Size) -> dict[str, Any]:
    """Return what a size sets in every recipe."""
    settings = parse_yaml(shipped_text(_FOLDER, _SIZES), _SIZES)[size]
    assert isinstance(settings, dict)
    return settings


def arm_recipe(
    study: StudyConfig, arm: ArmConfig, *, size: Size, recipe: str | None = None, overrides: Iterable[str] = ()
) -> Recipe:
    """Return the recipe of one arm: the study's, as size, study, arm and overrides set it, in this order.

    What all arms share is left out where an arm does not read it; what the arm sets itself must be read.

    Args:
        study: whose.
        arm: which.
        size: how much of it is run.
        recipe: another recipe than the study's; an arm that has one of its own keeps it.
        overrides: ``section.key=value`` texts for all arms.

    Raises:
        ConfigError: a setting is wrong; the message names study and arm.
    """
    own = as_overrides(arm.settings)
    shared = as_overrides(size_settings(size)) | as_overrides(study.settings)
    given = dict(_halves(override) for override in overrides)
    try:
        source = arm.recipe or recipe or study.recipe
        drafted = draft_recipe(recipe_text(source), _joined(shared | own | given), source=source)
        # what all arms share may be something that this one does not read
        common = {key: value for key, value in (shared | given).items() if unread(drafted, key) is None}
        last = {key: value for key, value in given.items() if key in common}
        return load_recipe(source, _joined(common | own | last))
    except ConfigError as error:
        raise ConfigError(f"study {study.name}, arm {arm.name}: {error}") from None


def as_overrides(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as the texts the command line would give: words as they are, all else as JSON, which is YAML."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):  # a section written as one sets its own keys, and wipes no other
            flat |= as_overrides({f"{key}.{inner}": each for inner, each in value.items()})
        else:
            flat[key] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _joined(settings: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def _halves(override: str) -> tuple[str, str]:
    key, equals, value = override.partition("=")
    if not key or not equals:
        raise ConfigError(f"{override}: expected key=value, such as train.steps=100")
    return key, value
