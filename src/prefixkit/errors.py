"""The error tree: everything prefixkit raises on purpose is a `PrefixkitError`.

    PrefixkitError
    ├── ConfigError          a recipe, an override or an option is wrong
    ├── DataError            a file, a column, a row or a split is wrong
    ├── ModelError           a base model cannot be found or loaded
    │   └── UnsupportedModelError   it loads, but cannot take a prefix
    ├── ArtefactError        a saved prefix is damaged or not what it says
    │   └── BaseMismatchError       it belongs to another base model
    ├── ExportError          another format cannot hold a prefix, or not here
    ├── InjectionError       a prefix does not fit what it is attached to
    ├── TrainingError        a run cannot start, go on, or be saved
    │   └── DivergedError           loss or gradients left the rails
    ├── EvaluationError      a measurement cannot be made
    │   └── NotFiniteError          a loss is no number
    └── SweepError           some trials of a sweep failed

A message says what is wrong, what was expected and what to do, the field's path first:
``prefix.reparam_depth: expected 0-3, got 5``. The command line prints that one line and exits 1.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class PrefixkitError(Exception):
    """Base class of every error prefixkit raises on purpose."""


class ConfigError(PrefixkitError):
    """A recipe, an override or a command-line option is wrong."""


class DataError(PrefixkitError):
    """A data file, a column, a row or a split is not usable."""


class ModelError(PrefixkitError):
    """A base model cannot be found, read or verified."""


class UnsupportedModelError(ModelError):
    """A base model loads, but cannot take a prefix; the message says why."""


class ArtefactError(PrefixkitError):
    """A saved prefix is incomplete, damaged, or of an unknown schema."""


class BaseMismatchError(ArtefactError):
    """A prefix was trained on another base model than the one at hand."""


class ExportError(PrefixkitError):
    """A prefix cannot be written in another format exactly, or not to that place."""


class InjectionError(PrefixkitError):
    """A prefix does not fit the model, the batch or the text it is attached to."""


class TrainingError(PrefixkitError):
    """A training run cannot start, continue or be saved."""


class DivergedError(TrainingError):
    """Loss or gradient norm became NaN or exploded."""


class EvaluationError(PrefixkitError):
    """A measurement cannot be made on what was given."""


class NotFiniteError(EvaluationError):
    """A loss is no finite number: what was trained diverged, what was loaded is damaged, or the dtype is too narrow."""


class SweepError(PrefixkitError):
    """Some trials of a sweep failed; the others' results are kept."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``'; did you mean "x"?'`` for the closest known word, or an empty string."""
    matches = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{matches[0]}"?' if matches else ""
