"""Checkpoints: written aside and renamed, so that a folder named checkpoint-N is always a whole one.

checkpoint-N/
    encoder.safetensors   the encoder's parameters
    best.safetensors      the encoder at the best held-out loss so far
    progress.json         best loss, patience, monitor, rollbacks
    optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json      transformers' Trainer's own
"""

import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from prefixkit.files import read_json, write_json

_NAME = re.compile(r"checkpoint-(\d+)")
_STAGING = "unfinished"


@dataclass
class Progress:
    """What our own callbacks must remember to go on exactly.

    Attributes:
        best_loss: lowest held-out loss so far; None before the first.
        best_step: step it was reached at.
        waited: held-out losses since then.
        recent_losses: the monitor's memory.
        rollbacks: times the run went back to a checkpoint with half the learning rate.
    """

    best_loss: float | None = None
    best_step: int = 0
    waited: int = 0
    recent_losses: list[float] = field(default_factory=list)
    rollbacks: int = 0


def checkpoint_folder(run: Path) -> Path:
    """Return where a run keeps its checkpoints."""
    return run / "training" / "checkpoints"


def staging(folder: Path) -> Path:
    """Return the folder a checkpoint is written to before it is whole; what was left there is removed."""
    path = folder / _STAGING
    shutil.rmtree(path, ignore_errors=True)
    return path


def publish(staged: Path, folder: Path, keep: int) -> Path:
    """Rename a whole checkpoint into place and remove the oldest beyond `keep`."""
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


def step_of(checkpoint: Path) -> int:
    """Return the optimiser step a checkpoint was made at."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def write_own(folder: Path, encoder: dict[str, Tensor], best: dict[str, Tensor] | None, progress: Progress) -> None:
    """Write our part of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in encoder.items()},
        folder / "encoder.safetensors",
    )
    if best is not None:
        save_file(best, folder / "best.safetensors")
    write_json(folder / "progress.json", asdict(progress))


def read_own(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, Progress]:
    """Read our part of a checkpoint: encoder, best encoder, progress."""
    best = folder / "best.safetensors"
    return (
        load_file(folder / "encoder.safetensors"),
        load_file(best) if best.exists() else None,
        Progress(**read_json(folder / "progress.json")),
    )
