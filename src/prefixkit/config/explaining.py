"""From what pydantic found wrong to one line a person can act on: path, what was expected, what was given."""

from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from prefixkit.errors import did_you_mean


def explain(error: ValidationError, root: type[BaseModel], known: str) -> str:
    """Return one line for the first thing that is wrong.

    Args:
        error: what pydantic raised.
        root: the model that was to be made.
        known: where the known keys can be looked up, such as ``see `prefixkit recipes show```.
    """
    found = error.errors()[0]
    location = _location(found)
    path = ".".join(location) or root.__name__.removesuffix("Config").lower()
    kind, given, context = found["type"], found["input"], found.get("ctx", {})
    if kind == "extra_forbidden":
        hint = did_you_mean(location[-1], _keys_at(root, location[:-1]))
        return f"{path}: unknown key{hint or f'; {known} for the known ones'}"
    if kind == "missing":
        return f"{path}: is missing"
    if kind == "value_error":
        return f"{path}: {context['error']}"
    bounds = _bounds(root, location)
    if bounds and kind in ("greater_than_equal", "less_than_equal", "greater_than", "less_than"):
        return f"{path}: expected {bounds}, got {given!r}"
    expected = found["msg"].removeprefix("Input should be ")
    return f"{path}: expected {expected}, got {given!r}"


def section_at(root: type[BaseModel], location: list[str]) -> type[BaseModel] | None:
    """Return the model at a path, through lists of models; None where there is none."""
    section = root
    for part in location:
        if part.isdigit():
            continue  # its place in a list, whose model is already at hand
        field = section.model_fields.get(part)
        models = [] if field is None else [kind for kind in _kinds(field.annotation) if _is_model(kind)]
        if not models:
            return None
        section = models[0]
    return section


def _kinds(annotation: Any) -> list[Any]:
    """Return a type and the types inside it."""
    return [annotation, *(kind for inner in get_args(annotation) for kind in _kinds(inner))]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _location(error: ErrorDetails) -> list[str]:
    """Return the path of the field, without the member of a union that pydantic tried last."""
    location = [str(part) for part in error["loc"]]
    return location[:-1] if location and location[-1] in ("str", "int", "bool", "float") else location


def _keys_at(root: type[BaseModel], location: list[str]) -> list[str]:
    section = section_at(root, location)
    return list(section.model_fields) if section else []


def _bounds(root: type[BaseModel], location: list[str]) -> str:
    """Return the range of a numeric field, such as ``0-3`` or ``at least 1``."""
    section = section_at(root, location[:-1])
    field = section.model_fields.get(location[-1]) if section else None
    if field is None:
        return ""
    limits = {name: getattr(item, name) for item in field.metadata for name in ("ge", "gt", "le", "lt")
              if getattr(item, name, None) is not None}  # fmt: skip
    if limits.keys() == {"ge", "le"}:
        return f"{limits['ge']}-{limits['le']}"
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    return " and ".join(f"{words[name]} {limit:g}" for name, limit in limits.items())
