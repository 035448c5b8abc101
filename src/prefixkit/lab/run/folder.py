"""The run folder: what lies in it, and whether a run may be started, gone on with, or thrown away."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prefixkit.config import Recipe, dump_recipe, parse_recipe, validate_recipe
from prefixkit.errors import ArtefactError, ConfigError, TrainingError
from prefixkit.files import read_json, write_text
from prefixkit.prefix import PREFIX_FILES

RECIPE, RUN, SCORES, SAMPLES, METRICS, REPORT, TRAINING = (
    "recipe.yaml", "run.json", "scores.json", "samples.jsonl", "metrics.jsonl", "report.html", "training",
)  # fmt: skip
PREDICTIONS = "predictions.jsonl"
BY_TEXT = "by_text.json"
"""How far each text moves each score, and a hash of the texts: what runs are compared by."""
LIKELIEST = "likeliest.json"
"""In the folder ``training``: which examples `data.likeliest` chose."""
ATTENTION = "attention.json"
"""Likewise: which attention is the fastest."""
SIZES = ("batch_size", "accumulation", "gradient_checkpointing", "recomputed_layers")
"""Settings of training that a memory budget chooses."""
DIAGNOSIS, DIAGNOSIS_PAGE = "diagnosis.json", "diagnosis.html"
_OWN = {
    RECIPE, RUN, SCORES, SAMPLES, PREDICTIONS, BY_TEXT, METRICS, REPORT, TRAINING, DIAGNOSIS, DIAGNOSIS_PAGE,
    *PREFIX_FILES, "row_losses.json",
}  # fmt: skip
"""What a run writes; the last one older runs did."""


def check_run(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Refuse what must not be done with a folder; changes nothing.

    Args:
        folder: the run folder.
        recipe: what is to run.
        resume: go on with what is there; a folder that is not there is started.
        overwrite: throw away what is there.

    Raises:
        TrainingError: the folder exists and neither was asked for, or it holds more than a run.
        ConfigError: the run to resume was started with another recipe, or both were asked for.
        ArtefactError: there is no run to resume in the folder.
    """
    if resume and overwrite:
        raise ConfigError("--resume keeps the run and --overwrite throws it away; give one of them")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if overwrite:
        foreign = sorted(path.name for path in folder.iterdir() if not _is_own(path))
        if foreign or not (folder / RECIPE).is_file():
            reason = f"it holds {foreign[0]}" if foreign else f"it has no {RECIPE}"
            raise TrainingError(f"{folder}: is not a run folder, {reason}; not overwriting it")
    elif resume:
        _check_same(read_recipe(folder), recipe)
    else:
        raise TrainingError(
            f"{folder}: exists already; go on with --resume, start again with --overwrite, or choose a name=..."
        )


def open_run(folder: Path, recipe: Recipe, *, overwrite: bool) -> None:
    """Make a folder that `check_run` let pass ready for a run: write ``recipe.yaml``, and no more than that.

    Raises:
        TrainingError: the folder cannot be written to.
    """
    try:
        if overwrite:
            _clear(folder)
        write_text(folder / RECIPE, dump_recipe(recipe))
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written to: {error.strerror}") from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from working in a folder meanwhile; the lock lies beside it, and goes with this process.

    Raises:
        TrainingError: another one is working in it.
    """
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
        lock.acquire()
    except Timeout:
        raise TrainingError(f"{folder}: another process is working in it; wait for it, or stop it") from None
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written to: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def read_recipe(folder: Path) -> Recipe:
    """Read the recipe of a run folder.

    Raises:
        ArtefactError: the folder is no run folder.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise ArtefactError(f"{folder}: is not a run folder (no {RECIPE})")
    return parse_recipe(path.read_text(encoding="utf-8"), source=str(path))


def read_record(path: Path) -> dict[str, Any]:
    """Read one of a run's JSON files; an absent one is empty.

    Raises:
        ArtefactError: it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        record = read_json(path)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise ArtefactError(f"{path}: damaged, not a JSON object; restore it, or start again with --overwrite")
    return record


def measured_with(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that scores depend on and that may change after training."""
    return {name: getattr(recipe, name).model_dump(mode="json") for name in ("evaluation", "generation")}


def is_measured(folder: Path, recipe: Recipe) -> bool:
    """Whether a run is at its end, its scores made with these settings."""
    before = read_record(folder / SCORES).get("measured_with")
    if not isinstance(before, dict):
        return False
    try:  # settings that are newer than the scores had their defaults
        return measured_with(validate_recipe(before)) == measured_with(recipe)
    except ConfigError:
        return False


def _clear(folder: Path) -> None:
    """Empty a folder that `check_run` found to hold a run and nothing else.

    Scores and checkpoints first, the recipe last: stopped at any point, what is left is the old run, not measured, or
    is thrown away next time.
    """
    order = [SCORES, TRAINING, RUN, METRICS, "", RECIPE]  # what is not named goes before the recipe
    places = {name: place for place, name in enumerate(order)}
    for path in sorted(folder.iterdir(), key=lambda path: places.get(path.name, places[""])) if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_own(path: Path) -> bool:
    """Whether a run wrote this; a killed one may leave a file it was about to rename into place."""
    return path.name in _OWN or (path.name.startswith(".") and path.name.endswith(".tmp"))


def _check_same(old: Recipe, new: Recipe) -> None:
    """Only what comes after training may change between start and resume."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    for section in ("model", "prefix", "method", "head", "data", "train"):
        for key, value in before[section].items():
            if after[section][key] != value:
                if section == "train" and key in SIZES and _per_step(before) == _per_step(after):
                    raise ConfigError(
                        f"train.{key}: the run was started with {value!r}, not {after[section][key]!r}; if "
                        "--memory-budget chose that, give it again with --resume"
                    )
                raise ConfigError(
                    f"{section}.{key}: the run was started with {value!r}, not {after[section][key]!r}; "
                    "resume with the same recipe, or start another run"
                )


def _per_step(recipe: dict[str, Any]) -> int:
    """Return the rows per optimiser step."""
    return int(recipe["train"]["batch_size"] * recipe["train"]["accumulation"])
