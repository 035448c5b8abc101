"""Prefixes from and to other people's formats, by folder: what the commands `export` and `import` do."""

from collections.abc import Sequence
from pathlib import Path

from prefixkit.errors import ArtefactError
from prefixkit.export import PEFT_FILES, check_target, from_peft, to_peft
from prefixkit.export.adapter import read_adapter
from prefixkit.lab.run.loaded_run import load_run
from prefixkit.models import load_base_model
from prefixkit.models.sources import hub_revision
from prefixkit.prefix import PREFIX_FILES, Prefix


def export_peft(run: Path, out: Path, *, base: str | None = None, overwrite: bool = False) -> Prefix:
    """Write a run's prefix, or an artefact, as a PEFT checkpoint.

    Args:
        run: a run, or an artefact.
        out: the checkpoint's folder.
        base: the base model; left out, the one the run names.
        overwrite: replace an earlier checkpoint in the folder.

    Raises:
        ExportError: PEFT's format cannot say what the prefix is, or `out` is taken.
        ArtefactError: `run` holds no artefact, or the base model is not the prefix's.
    """
    prefix = Prefix.load(run)
    check_target(out, PEFT_FILES, overwrite=overwrite)
    model = load_run(run)[0].model if base is None else load_base_model(base).model
    to_peft(prefix, out, model)
    return prefix


def import_peft(
    folder: Path,
    out: Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    labels: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Prefix:
    """Turn a PEFT checkpoint into an artefact, bound to the base model it is imported with.

    Args:
        folder: what PEFT's `save_pretrained` wrote.
        out: the artefact's folder.
        base: the base model; left out, the one the checkpoint names.
        revision: its revision, for a hub model.
        labels: names for the logits of its head, where it has one.
        overwrite: replace an earlier artefact in the folder.

    Raises:
        ArtefactError: the checkpoint cannot be imported exactly, or names no base model.
        ExportError: `out` is taken.
        ModelError: the base model cannot be loaded, or takes no prefix.
    """
    config = read_adapter(folder).config
    check_target(out, PREFIX_FILES, overwrite=overwrite)
    name = base or config.base_model
    if name is None:
        raise ArtefactError(f"{folder}: does not say which base model it belongs to; give it with --base")
    if base is None and revision is None:
        revision = hub_revision(name, config.revision)
    loaded = load_base_model(name, revision=revision)
    found = loaded.revision if base is not None else loaded.revision or config.revision
    return from_peft(folder, loaded.model, base_id=name, revision=found, labels=labels).save(out)
