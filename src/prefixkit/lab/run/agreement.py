"""Who must agree before a run goes on: its processes with one another, and all of them with how it was started."""

from pathlib import Path

from prefixkit import processes
from prefixkit.data import PreparedData
from prefixkit.errors import ArtefactError, TrainingError
from prefixkit.lab.run.folder import RECIPE, RUN, read_record
from prefixkit.models import Base
from prefixkit.models.fingerprint import weights_hash
from prefixkit.prefix import Prefix
from prefixkit.training import checkpoint_folder, checkpoints


def check_alike(base: Base, data: PreparedData) -> None:
    """All processes must have loaded the same."""
    if processes.count() > 1:
        mine = data.hash, weights_hash(base.model)
        alike = mine == processes.from_first(mine)
        (others,) = processes.totals(not alike)
        if others:
            raise TrainingError(
                "the processes of this run loaded different data or base models; give all the same files"
            )


def check_shared(folder: Path) -> None:
    """All processes must see the run that the first one has opened, and its checkpoints."""
    mine = (folder / RECIPE).is_file(), [path.name for path in checkpoints(checkpoint_folder(folder))]
    (others,) = processes.totals(mine != processes.from_first(mine))
    if others:
        raise TrainingError(
            f"{folder}: not all processes of this run see it; give --out on a disk that all machines share"
        )


def check_unchanged(folder: Path, base: Base, data: PreparedData) -> None:
    """A run that is resumed or measured again must meet the data and the base model it was started with."""
    started = read_record(folder / RUN)
    if not started and checkpoints(checkpoint_folder(folder)):
        raise ArtefactError(f"{folder}: no {RUN} says what its checkpoints learned from; start again with --overwrite")
    if not started:
        return
    hashes = (started.get("data_hash"), (started.get("base_weights_hash") or {}).get("before"))
    if None in hashes:
        raise ArtefactError(f"{folder / RUN}: damaged, without hashes; restore it, or start again with --overwrite")
    if hashes[0] != data.hash:
        raise TrainingError(f"{folder}: the data changed since this run was started; start another run")
    if hashes[1] != weights_hash(base.model):
        raise TrainingError(f"{folder}: the base model changed since this run was started; start another run")


def check_artefact(folder: Path, prefix: Prefix) -> None:
    """A run that is measured must still hold the artefact that it ended in."""
    if not (record := read_record(folder / RUN)):
        raise ArtefactError(f"{folder}: holds no {RUN}, so that it is not known what the run learned; restore it")
    if prefix.card.content_hash != record.get("content_hash"):
        raise ArtefactError(f"{folder}: its prefix is not the one that {RUN} tells of; start again with --overwrite")
