"""Checkpoints: written aside and renamed, so that a folder named checkpoint-N is always a whole one.

checkpoint-N/
    encoder.safetensors   the encoder's parameters and its units, the classification head's and other methods'
    best.safetensors      the same at the best held-out loss so far
    progress.json         best loss, patience, monitor, rollbacks
    sums.json             SHA-256 of every file beside it
    optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json      transformers' Trainer's own
"""

import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from prefixkit.errors import TrainingError
from prefixkit.files import read_json, sha256_file, write_json
from prefixkit.logs import get_logger

log = get_logger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
_STAGING = "unfinished"
_ENCODER, _BEST = "encoder.safetensors", "best.safetensors"
_SUMS = "sums.json"


@dataclass
class Progress:
    """What our own callbacks must remember to go on exactly.

    Attributes:
        best_loss: lowest held-out loss so far; None before the first.
        best_step: step it was reached at.
        waited: held-out losses since then.
        recent_losses: the monitor's memory.
        recent_norms: likewise.
        rollbacks: times the run went back to a checkpoint with half the learning rate.
    """

    best_loss: float | None = None
    best_step: int = 0
    waited: int = 0
    recent_losses: list[float] = field(default_factory=list)
    recent_norms: list[float] = field(default_factory=list)
    rollbacks: int = 0


def checkpoint_folder(run: Path) -> Path:
    """Return where a run keeps its checkpoints."""
    return run / "training" / "checkpoints"


def staging(folder: Path) -> Path:
    """Return the folder a checkpoint is written to before it is whole."""
    return folder / _STAGING


def publish(staged: Path, folder: Path, keep: int) -> Path:
    """Take the sums of a whole checkpoint, rename it into place, and remove the oldest beyond `keep`."""
    write_json(staged / _SUMS, {path.name: sha256_file(path) for path in sorted(staged.iterdir()) if path.is_file()})
    target = folder / staged.name
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def newest_readable(folder: Path) -> Path | None:
    """Return the newest checkpoint of which every file is what was written, None where there is no checkpoint at all.

    Raises:
        TrainingError: there are checkpoints, but all are damaged.
    """
    found = checkpoints(folder)
    for checkpoint in reversed(found):
        try:
            _check(checkpoint)
        except (OSError, ValueError) as error:
            log.warning("%s is damaged and left out: %s", checkpoint, " ".join(str(error).split())[:120])
        else:
            return checkpoint
    if found:
        raise TrainingError(f"{folder}: every checkpoint is damaged; start again with --overwrite")
    return None


def _check(checkpoint: Path) -> None:
    """Compare every file of a checkpoint with the sums that were taken of it.

    Raises:
        OSError: one cannot be read.
        ValueError: one is missing, or not what was written, or the sums are.
    """
    sums = checkpoint / _SUMS
    for name, written in read_json(sums).items() if sums.is_file() else [(_SUMS, "")]:
        if not (checkpoint / name).is_file():
            raise ValueError(f"{name} is missing")
        if sha256_file(checkpoint / name) != written:
            raise ValueError(f"{name} is not what was written")


def step_of(checkpoint: Path) -> int:
    """Return the optimiser step a checkpoint was made at."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def write_own(folder: Path, trained: dict[str, Tensor], best: dict[str, Tensor] | None, progress: Progress) -> None:
    """Write our part of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    # write_bytes, not save_file: its full disk is no OSError
    (folder / _ENCODER).write_bytes(save({name: tensor.detach().contiguous() for name, tensor in trained.items()}))
    if best is not None:
        (folder / _BEST).write_bytes(save(best))
    write_json(folder / "progress.json", asdict(progress))


def read_own(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, Progress]:
    """Read our part of a checkpoint: the trained parameters, the best so far, progress."""
    best = folder / _BEST
    return (
        load_file(folder / _ENCODER),
        load_file(best) if best.exists() else None,
        Progress(**read_json(folder / "progress.json")),
    )
