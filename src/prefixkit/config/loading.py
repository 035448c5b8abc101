"""From a YAML file and `a.b=c` overrides to a `Recipe`, with errors a person can act on."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from prefixkit.config.explaining import explain, section_at
from prefixkit.config.method import MethodConfig
from prefixkit.config.recipe import Recipe
from prefixkit.config.shipped import shipped_names, text_of
from prefixkit.config.unread import unread
from prefixkit.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML whose numbers include 5e-3 (YAML 1.1 reads that as a word) and whose keys are unique."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise ConfigError(f"{min(twice)}: given twice in the same section; keep one")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: a text that looks like one of its numbers gets quotes."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with prefixkit."""
    return shipped_names("recipes")


def recipe_text(name_or_path: str) -> str:
    """Return the text of a recipe file, or of a shipped recipe by its name.

    Raises:
        ConfigError: there is no such file and no such recipe.
    """
    listed_by = "prefixkit recipes list"
    return text_of(name_or_path, "recipes", recipe_names(), what="recipe", listed_by=listed_by)


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply overrides such as ``prefix.num_virtual_tokens=50``.

    Args:
        name_or_path: a YAML file, or the name of a shipped recipe.
        overrides: ``section.key=value`` texts. Values are read as YAML, except those of settings that are text, which
            are taken as they are typed (``null`` leaves an optional one out).

    Raises:
        ConfigError: a key is unknown, a value has the wrong type or range, or the file is not YAML. The message
            starts with the path of the field.
    """
    return parse_recipe(recipe_text(name_or_path), overrides, source=name_or_path)


def parse_recipe(text: str, overrides: Iterable[str] = (), *, source: str = "recipe") -> Recipe:
    """Like `load_recipe`, from the recipe's text."""
    overrides = list(overrides)
    recipe = draft_recipe(text, overrides, source=source)
    for override in overrides:
        key = override.partition("=")[0]
        if (why := unread(recipe, key)) is not None:
            raise ConfigError(f"{key}: {why}")
    return recipe


def draft_recipe(text: str, overrides: Iterable[str], *, source: str) -> Recipe:
    """Like `parse_recipe`, where an override may be of something that nothing reads."""
    values = parse_yaml(text, source)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected sections such as `prefix:`, got {type(values).__name__}")
    for override in sorted(overrides, key=_depth):  # method=lora before method.rank=4, however they were given
        _apply_override(values, override)
    return validate_recipe(values)


def validate_recipe(values: Mapping[str, Any]) -> Recipe:
    """Turn plain values into a `Recipe`.

    Raises:
        ConfigError: as for `load_recipe`.
    """
    try:
        return Recipe.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(explain(error, Recipe, "see `prefixkit recipes show`")) from None


def dump_recipe(recipe: Recipe, *, only_changes: bool = False) -> str:
    """Return a recipe as YAML, whole or only where it differs from the defaults."""
    values = recipe.model_dump(mode="json", exclude_defaults=only_changes)
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def parse_yaml(text: str, source: str) -> Any:
    """Read YAML.

    Raises:
        ConfigError: it is none; the message names the source and the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None


def _depth(override: str) -> int:
    return override.partition("=")[0].count(".")


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, equals, raw = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"{override}: expected key=value, such as prefix.num_virtual_tokens=50")
    *parents, leaf = path.split(".")
    for depth, parent in enumerate(parents):
        if values.get(parent) is None:  # absent, or an empty section
            values[parent] = {}
        child = values[parent]
        if isinstance(child, str) and parents[: depth + 1] == ["method"]:
            child = values[parent] = _from_word(child)
        if not isinstance(child, dict):
            raise ConfigError(f"{path}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        values = child
    values[leaf] = raw if _is_plain_text(raw, path.split(".")) else parse_yaml(raw, path)


def _from_word(word: str) -> dict[str, Any]:
    try:
        return MethodConfig.from_word(word)
    except ValueError as error:
        raise ConfigError(f"method: {error}") from None


def _is_plain_text(raw: str, location: list[str]) -> bool:
    """Whether a value is to be taken as it is typed: the setting is text, and the value neither null nor quoted."""
    section = section_at(Recipe, location[:-1])
    field = section.model_fields.get(location[-1]) if section else None
    kinds = (set(get_args(field.annotation)) or {field.annotation}) if field else set()
    is_text = str in kinds and kinds <= {str, int, bool, type(None)}
    is_null = raw in ("null", "~") and type(None) in kinds
    is_quoted = len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "'\""
    return is_text and not is_null and not is_quoted
