"""What a diagnosis holds: how much attention a trained prefix gets, where, beside how much text, and from what tokens.

See docs/diagnose.md for what the numbers mean.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from prefixkit.config import Placement
from prefixkit.errors import EvaluationError
from prefixkit.models.hardware import Machine


@dataclass(frozen=True)
class Lengths:
    """A point of the curves: text lengths from `first` to `last`, and how many texts are at least that long."""

    first: int
    last: int
    texts: int

    @property
    def middle(self) -> float:
        """Where the point stands on an axis."""
        return (self.first + self.last) / 2


@dataclass(frozen=True)
class LayerDiagnosis:
    """One attention layer; shares are of a query's attention, between 0 and 1."""

    layer: int
    num_virtual_tokens: int
    share: float
    """What the prefix gets, mean over heads and the queries counted."""
    uniform: float
    """What it would get if all keys got the same."""
    heads: tuple[float, ...]
    """What it gets per query head."""
    by_length: tuple[float, ...]
    """What it gets at each point of the curves."""
    gate: tuple[float, ...]
    """Per query head; empty without a gate."""


@dataclass(frozen=True)
class VirtualToken:
    """One virtual token of a placement, over the layers that have it."""

    index: int
    share: float
    """Its part of `PlacementDiagnosis.share`; these add up to it."""
    key_norm: float
    """Length of its key, in units of the mean text key's."""
    value_norm: float
    """Length of its value, in units of the mean text value's."""


@dataclass(frozen=True)
class PlacementDiagnosis:
    """What was found out about the virtual tokens of one placement."""

    placement: Placement
    within: int
    """Layers, heads and virtual tokens are means over the first so many tokens of each text: the length trained on."""
    share: float
    """What the prefix gets, mean over the layers that have virtual tokens."""
    uniform: float
    points: tuple[Lengths, ...]
    """Text in sight: what was read so far, in decoder self-attention; the encoder's whole text elsewhere."""
    by_length: tuple[float, ...]
    """`share` at each point."""
    uniform_by_length: tuple[float, ...]
    layers: tuple[LayerDiagnosis, ...]
    virtual_tokens: tuple[VirtualToken, ...]

    @property
    def active(self) -> tuple[LayerDiagnosis, ...]:
        """The layers that have virtual tokens."""
        return tuple(layer for layer in self.layers if layer.num_virtual_tokens)


@dataclass(frozen=True)
class Diagnosis:
    """What was found out about a prefix."""

    name: str
    base: str
    prefix_hash: str
    source: str
    """Where the held-out texts come from."""
    texts: int
    placements: tuple[PlacementDiagnosis, ...]
    """Those that have virtual tokens."""
    without: tuple[Placement, ...]
    """Those of the model that have none."""
    dtype: str
    attention: str
    machine: Machine


def read_diagnosis(path: Path) -> Diagnosis:
    """Read a ``diagnosis.json``.

    Raises:
        EvaluationError: there is none, or it is damaged or of another version.
    """
    try:
        return TypeAdapter(Diagnosis).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise EvaluationError(f"{path}: no diagnosis of this version; run `prefixkit diagnose`") from None
