"""Where transformers finds a base model: a source, turned into arguments for its `from_pretrained` methods."""

from dataclasses import dataclass
from typing import Any

from prefixkit.errors import ModelError
from prefixkit.models.packaged import PACKAGED_MODELS, packaged_folder
from prefixkit.models.sources import Source, SourceKind

# Unless told, transformers asks on stdin whether to run a repository's own code; that is never run here.
NO_FOREIGN_CODE: dict[str, Any] = {"trust_remote_code": False}


@dataclass(frozen=True)
class Location:
    """What transformers' `from_pretrained` methods are called with."""

    where: str
    options: dict[str, Any]


def locate(source: Source, revision: str | None) -> Location:
    """Turn a source into arguments for `from_pretrained`, making the packaged model's folder where needed.

    Raises:
        ModelError: a revision is given for what is no hub model, or the packaged model cannot be fetched or stored.
    """
    if revision is not None and source.kind is not SourceKind.HUB:
        raise ModelError(f"model.revision: {source.name} is no hub model; leave the revision out, got {revision!r}")
    options = dict(NO_FOREIGN_CODE)
    if source.kind is SourceKind.PACKAGED:
        return Location(str(packaged_folder(PACKAGED_MODELS[source.name])), options)
    if source.path is None:
        return Location(source.name, options | {"revision": revision or "main"})
    if source.kind is SourceKind.GGUF:
        path = source.path.resolve()
        return Location(str(path.parent), options | {"gguf_file": path.name})
    return Location(str(source.path), options)


def pinned(location: Location) -> tuple[Location, str]:
    """Return a hub model's location at one commit, and that commit: weights and tokenizer are then of the same one.

    Raises:
        HfHubHTTPError, RevisionResolutionError: the hub has no such model or revision, or cannot be reached and the
            cache does not know the revision.
    """
    from huggingface_hub import HfApi

    revision = HfApi().resolve_revision(location.where, revision=location.options["revision"])
    return Location(location.where, location.options | {"revision": revision}), revision.resolved
