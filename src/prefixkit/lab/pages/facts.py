"""Facts for people: what JSON files record, named and written the way one says it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prefixkit.config import Recipe
from prefixkit.lab.pages.comparison import is_number

Json = Mapping[str, Any]
Writers = Mapping[str, tuple[str, Callable[[Any], str]]]
"""Per key of a JSON object: the name a person reads, and how the value is written."""


@dataclass(frozen=True)
class Fact:
    """A name and a value, ready to read; `note` is said in smaller letters."""

    name: str
    value: str
    note: str = ""


def recipe_changes(recipe: Json) -> list[Fact]:
    """Return the settings that differ from the defaults, each with its default."""
    defaults = _flatten(Recipe().model_dump(mode="json"))
    told_elsewhere = ("name", "description", "licence")
    return [
        Fact(key, _plain(value), _plain(defaults[key]) if key in defaults else "")
        for key, value in _flatten(recipe).items()
        if key not in told_elsewhere and value != defaults.get(key)
    ]


def named_facts(values: Json, writers: Writers) -> list[Fact]:
    """Return a fact for each key that has a value; absent, null and empty ones are left out."""
    return [
        Fact(name, write(values[key])) for key, (name, write) in writers.items() if values.get(key) not in (None, "")
    ]


def flat_facts(values: Json) -> list[Fact]:
    """Return a fact for each leaf of a JSON object, sizes in bytes written as sizes."""
    facts = []
    for key, value in _flatten(values).items():
        is_size = key.endswith("_bytes") and is_number(value)
        name = key.removesuffix("_bytes") if is_size else key
        facts.append(Fact(name.replace("_", " "), format_bytes(value) if is_size else _plain(value)))
    return facts


def _flatten(values: Json, path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return flat


def _plain(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value) or "none"
    return str(value)


def format_bytes(count: int | float) -> str:
    """Write a size with three digits: 922 kB, 2.14 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_duration(seconds: int | float) -> str:
    """Write a time the way people say it: 42 s, 6 min 12 s, 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_count(count: int | float) -> str:
    """Write a whole number with its thousands apart: 230,400."""
    return f"{count:,.0f}"
