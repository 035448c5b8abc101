"""What a base model's name means: a packaged model, a folder, a GGUF file, or an id on the model hub."""

import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from prefixkit.errors import ModelError, did_you_mean
from prefixkit.models.packaged import PACKAGED_MODELS

#: ``name`` or ``owner/name``, as the hub allows them.
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?$")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


class SourceKind(StrEnum):
    """Where a base model comes from."""

    PACKAGED = "packaged"
    FOLDER = "folder"
    GGUF = "gguf"
    HUB = "hub"


@dataclass(frozen=True)
class Source:
    """A name, understood."""

    name: str
    """As the user wrote it."""
    kind: SourceKind
    path: Path | None = None
    """The folder or the GGUF file; None for packaged models and the hub."""


def resolve_source(name: str) -> Source:
    """Understand a base model's name; the first that fits of packaged, folder, .gguf file, hub id.

    Nothing is loaded or fetched here.

    Raises:
        ModelError: a folder holds no model, a path does not exist, or the name cannot be a hub id either.
    """
    if name in PACKAGED_MODELS:
        return Source(name, SourceKind.PACKAGED)
    path = Path(os.path.expanduser(name))  # Path.expanduser raises where there is no such user
    if name and path.is_dir():
        _require_model(name, path)
        return Source(name, SourceKind.FOLDER, path)
    if name.lower().endswith(".gguf"):
        if path.is_file():
            return Source(name, SourceKind.GGUF, path)
        raise ModelError(f"{name}: no such file; give the path of a .gguf file")
    if path.is_file():
        raise ModelError(f"{name}: a file, but not a .gguf file; give a model's folder, or a .gguf file")
    if _is_path(name) or not _HUB_ID.match(name):
        packaged = f"a packaged model ({packaged_names()})"
        raise ModelError(f"{name}: no such folder; give a folder, a .gguf file, a hub id, or {packaged}")
    return Source(name, SourceKind.HUB)


def hub_revision(name: str, revision: str | None) -> str | None:
    """Return the revision if the name is a hub model's; only those are loaded by one."""
    return revision if resolve_source(name).kind is SourceKind.HUB else None


def packaged_names() -> str:
    """Return the names of the packaged models, for messages."""
    return ", ".join(PACKAGED_MODELS)


def packaged_hint(name: str) -> str:
    """Return ``'; did you mean "smollm2-135m"?'`` where a packaged name is close, or an empty string."""
    return did_you_mean(name.lower(), PACKAGED_MODELS)


def _is_path(name: str) -> bool:
    return name.startswith((".", "~", "/")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)


def _require_model(name: str, folder: Path) -> None:
    """Refuse a folder that is not a model, naming what is missing."""
    if (folder / "prefix.json").is_file():
        raise ModelError(f"{name}: this folder holds an artefact, not a base model; give the model it was trained on")
    if not (folder / "config.json").is_file():
        inside = sorted(folder.glob("*.gguf"))
        hint = f"give the file itself, {inside[0]}" if inside else "is it a transformers model folder?"
        raise ModelError(f"{name}: no config.json in this folder; {hint}")
    if not any(found for pattern in _WEIGHTS for found in folder.glob(pattern)):
        raise ModelError(f"{name}: no weights in this folder; expected model.safetensors or its shards")
