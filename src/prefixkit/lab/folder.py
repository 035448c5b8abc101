"""The run folder: whether one may be started, gone on with, or thrown away."""

import shutil
from pathlib import Path

from prefixkit.config import Recipe, dump_recipe, parse_recipe
from prefixkit.errors import ArtefactError, ConfigError, TrainingError
from prefixkit.files import write_text

RECIPE, RUN, SCORES, SAMPLES, METRICS, REPORT = (
    "recipe.yaml", "run.json", "scores.json", "samples.jsonl", "metrics.jsonl", "report.html",
)  # fmt: skip


def open_run(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Make a folder ready for a run.

    Args:
        folder: the run folder.
        recipe: what is to run; written to ``recipe.yaml``.
        resume: go on with what is there; a folder that is not there is started.
        overwrite: throw away what is there.

    Raises:
        TrainingError: the folder exists and neither was asked for, or it is no run folder.
        ConfigError: the run to resume was started with another recipe.
    """
    if folder.exists() and any(folder.iterdir()):
        if overwrite:
            if not (folder / RECIPE).is_file():
                raise TrainingError(f"{folder}: is not a run folder (no {RECIPE}); not overwriting it")
            shutil.rmtree(folder)
        elif resume:
            _check_same(read_recipe(folder), recipe)
        else:
            raise TrainingError(
                f"{folder}: exists already; go on with --resume, start again with --overwrite, or choose a name=..."
            )
    try:
        write_text(folder / RECIPE, dump_recipe(recipe))
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written to: {error.strerror}") from None


def read_recipe(folder: Path) -> Recipe:
    """Read the recipe of a run folder.

    Raises:
        ArtefactError: the folder is no run folder.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise ArtefactError(f"{folder}: is not a run folder (no {RECIPE})")
    return parse_recipe(path.read_text(encoding="utf-8"), source=str(path))


def _check_same(old: Recipe, new: Recipe) -> None:
    """Only what comes after training may change between start and resume."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    for section in ("model", "prefix", "data", "train"):
        for key, value in before[section].items():
            if after[section][key] != value:
                raise ConfigError(
                    f"{section}.{key}: the run was started with {value!r}, not {after[section][key]!r}; "
                    "resume with the same recipe, or start another run"
                )
