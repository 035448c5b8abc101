"""The card of an artefact (`prefix.json`): what the numbers beside it mean and where they come from."""

from functools import lru_cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from prefixkit.config import Method, Placement, Pooling
from prefixkit.prefix.delta import Delta
from prefixkit.prefix.geometry import Geometry, Site
from prefixkit.prefix.head import Head, HeadKind

#: Raised by one when a reader of the old schema would misread the new one.
SCHEMA_VERSION: Literal[1] = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SiteCard(_Part):
    """One attention layer and how many virtual tokens it holds."""

    placement: Placement
    layer: int
    query_heads: int
    kv_heads: int
    head_dim: int
    num_virtual_tokens: int = Field(ge=0)

    def site(self) -> Site:
        """Return the geometry of this layer."""
        return Site(self.placement, self.layer, self.query_heads, self.kv_heads, self.head_dim)


class BaseCard(_Part):
    """The base model a prefix belongs to."""

    id: str
    """What the model was loaded as."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    fingerprint: str | None = None
    """Identity of configuration and weights, the same in float64, float32 and bfloat16; None accepts any model."""


class HeadCard(_Part):
    """The classification head that was trained with a prefix."""

    kind: HeadKind
    """What gets a label: a whole text, or each word."""
    labels: tuple[str, ...] = Field(min_length=2)
    """Name of each label, in the order of the logits."""
    hidden_size: int = Field(ge=1)
    """Width of the hidden states it reads."""
    pooling: Pooling = Pooling.TOKEN
    """The hidden state of a whole text: one token's, the mean of all, or that of its own last token."""

    @classmethod
    def of(cls, head: Head) -> "HeadCard":
        """Describe a head."""
        return cls(kind=head.kind, labels=head.labels, hidden_size=head.weight.shape[1], pooling=head.pooling)


class DeltaCard(_Part):
    """A change of the model's layers that was trained beside a prefix, or in place of one."""

    method: Method
    """LoRA, say."""
    settings: dict[str, Any]
    """Everything needed to build its layers again."""
    tensors: dict[str, tuple[int, ...]]
    """Name and shape of its tensors."""

    @classmethod
    def of(cls, delta: Delta) -> "DeltaCard":
        """Describe a delta."""
        shapes = {name: tuple(tensor.shape) for name, tensor in delta.tensors.items()}
        return cls(method=delta.method, settings=dict(delta.settings), tensors=shapes)


class TrainingCard(_Part):
    """How a prefix was trained."""

    recipe: dict[str, Any]
    """The whole recipe."""
    seed: int
    """The run's seed."""
    steps: int
    """Optimiser steps taken."""
    data_hash: str
    """Hash of the examples it was trained on, in order; with `data.likeliest`, of those that chooses from."""
    trained_parameters: int
    """Numbers that were trained; with an MLP more than the artefact holds."""
    base_weights_hash: str
    """SHA-256 over all base weights, the same before and after training."""
    versions: dict[str, str]
    """Versions of the libraries."""


@lru_cache(maxsize=64)
def _shared(sites: tuple[SiteCard, ...]) -> tuple[SiteCard, ...]:
    """Return the first of all equal lists of sites: thousands of prefixes of one model hold it once."""
    return sites


@lru_cache(maxsize=64)
def _geometry(sites: tuple[SiteCard, ...]) -> Geometry:
    return Geometry(tuple(card.site() for card in sites))


class PrefixCard(_Part):
    """Everything about a prefix but its numbers."""

    schema_version: Literal[1] = SCHEMA_VERSION
    base: BaseCard
    position_offset: int = Field(ge=0)
    """Position of the first text token."""
    sites: tuple[SiteCard, ...]
    """The geometry, with the length at each site."""
    infix: bool = False
    """Whether the virtual tokens stand between input and target, seen by the target alone (Li & Liang, 2021, §7.3)."""
    head: HeadCard | None = None
    """None for a prefix that steers text."""
    deltas: tuple[DeltaCard, ...] = ()
    """What is changed beside the keys and values; of each method one at most."""
    turned_off: tuple[str, ...] = ()
    """Parts it was trained with and no longer has (`Prefix.without`); `training` speaks of all of them."""
    training: TrainingCard | None = None
    """None for a prefix that was made, not trained (from a text, say)."""
    scores: dict[str, float] = {}
    """What evaluation measured, as in scores.json."""
    licence: str = ""
    """Terms of the base model and the data."""
    content_hash: str = ""
    """SHA-256 of prefix.safetensors."""

    _share_sites = field_validator("sites")(_shared)

    def to_json(self) -> dict[str, Any]:
        """Return the content of prefix.json; what is absent is left out, as readers from before know no such key."""
        absent = {name for name in ("infix", "head", "deltas", "turned_off") if not getattr(self, name)}
        return self.model_dump(mode="json", exclude=absent)

    @field_validator("deltas")
    @classmethod
    def _are_of_different_methods(cls, deltas: tuple[DeltaCard, ...]) -> tuple[DeltaCard, ...]:
        methods = [delta.method for delta in deltas]
        if len(set(methods)) < len(methods):
            raise ValueError("holds one method twice")
        return deltas

    def geometry(self) -> Geometry:
        """Return the geometry of the base model."""
        return _geometry(self.sites)
