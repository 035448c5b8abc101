"""What a model's configuration alone says about a prefix: whether it fits, where, and what a virtual token costs.

The model is built on torch's meta device, where tensors have shapes and no numbers, and asked as a loaded one would
be (`inspect_model`). So a model of any size is surveyed in seconds; its weights are neither fetched nor read.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PretrainedConfig,
    PreTrainedModel,
)

from prefixkit.compat import eager_attention, is_encoder, layer_windows, writes_text
from prefixkit.config import Attention, Placement
from prefixkit.errors import PrefixkitError, UnsupportedModelError
from prefixkit.models.base import load_base_model
from prefixkit.models.inspect import IMPLEMENTATIONS, Anatomy, Kind, inspect_model
from prefixkit.models.locations import NO_FOREIGN_CODE, locate
from prefixkit.models.quiet import quiet_transformers
from prefixkit.models.refusals import explain_failure, require_language_model
from prefixkit.models.sources import Source, SourceKind, resolve_source


@dataclass(frozen=True)
class Stack:
    """The attention layers of one placement. A number that differs between layers is given once per value."""

    placement: Placement
    layers: int
    query_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    numbers_per_token: int
    """Parameters of one virtual token, over the layers of this stack."""
    windowed_layers: tuple[int, ...]
    """Layers whose text tokens see only the nearest text; they see the whole prefix all the same."""
    window_tokens: tuple[int, ...]
    """How far those see."""


@dataclass(frozen=True)
class Survey:
    """What `survey_model` found; the model can take a prefix."""

    model: str
    """As it was asked for."""
    source: SourceKind
    kind: Kind
    family: str
    """transformers' name of the architecture, such as ``llama``."""
    architecture: str
    """The class that reads text, such as ``LlamaForCausalLM``."""
    base_parameters: int
    attention: tuple[Attention, ...]
    """Attention implementations a prefix can be prepended for, the one to prefer first."""
    stacks: tuple[Stack, ...]
    context_tokens: int | None
    """Positions the model was made for; None if it sets no limit."""
    num_virtual_tokens: int
    """The length of prefix the following is said for."""
    is_loaded: bool
    """Whether the weights had to be read to find this out."""
    rope_switch: int | None = None
    """Beyond so many positions all rotary angles change (longrope); None if they never do."""

    @property
    def numbers_per_token(self) -> int:
        """Parameters of one virtual token, over all layers."""
        return sum(stack.numbers_per_token for stack in self.stacks)

    @property
    def positions_left(self) -> int | None:
        """Positions left for text after the prefix; None if the model sets no limit."""
        return None if self.context_tokens is None else self.context_tokens - self.num_virtual_tokens

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Size of one virtual token in a number format."""
        return self.numbers_per_token * dtype.itemsize


def survey_model(base: str, *, revision: str | None = None, num_virtual_tokens: int = 20) -> Survey:
    """Say whether a model can take a prefix, and how.

    Args:
        base: a packaged model, a folder, a .gguf file, or a hub id, as for `load_base_model`.
        revision: branch, tag or commit of a hub model.
        num_virtual_tokens: length of prefix to count positions for.

    Raises:
        UnsupportedModelError: it cannot; the message says why.
        ModelError: the model cannot be found or read.
    """
    source = resolve_source(base)
    config = read_config(source, revision)
    asked: dict[Attention, tuple[PreTrainedModel, bool]] = {}
    refusals: list[UnsupportedModelError] = []
    for attention in map(Attention, IMPLEMENTATIONS):
        try:
            asked[attention] = _ask(source, config, attention, revision)
        except UnsupportedModelError as refusal:
            refusals.append(refusal)
    if not asked:
        raise refusals[-1]  # eager's: a family without sdpa is refused for that before it is asked anything
    model, is_loaded = next(iter(asked.values()))
    anatomy = inspect_model(model)
    return Survey(
        model=base,
        source=source.kind,
        kind=anatomy.kind,
        family=model.config.model_type,
        architecture=type(model).__name__,
        base_parameters=sum(weight.numel() for weight in model.parameters()),
        attention=tuple(asked),
        stacks=_stacks(anatomy, model.config),
        context_tokens=anatomy.context_tokens,
        num_virtual_tokens=num_virtual_tokens,
        is_loaded=is_loaded,
        rope_switch=anatomy.rope_switch,
    )


def read_config(source: Source, revision: str | None = None) -> PretrainedConfig:
    """Return a model's configuration alone.

    Raises:
        ModelError: it cannot be found or read.
    """
    location = locate(source, revision)
    try:
        with quiet_transformers():
            config: PretrainedConfig = AutoConfig.from_pretrained(location.where, **location.options)
    except Exception as error:
        raise explain_failure(source, error, revision=revision) from None
    return config


def _builder(source: Source, config: PretrainedConfig) -> Any:
    """Return transformers' class for this kind of model."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM if writes_text(config) else AutoModelForSpeechSeq2Seq
    if is_encoder(config):
        return AutoModelForMaskedLM
    require_language_model(source.name, config)
    return AutoModelForCausalLM


def _ask(
    source: Source, config: PretrainedConfig, attention: Attention, revision: str | None
) -> tuple[PreTrainedModel, bool]:
    """Return a model that can take a prefix under an attention implementation, and whether it has its weights."""
    builder = _builder(source, config)
    try:
        with quiet_transformers(), torch.device("meta"):
            model: PreTrainedModel = builder.from_config(
                copy.deepcopy(config), attn_implementation=attention.value, dtype=torch.bfloat16, **NO_FOREIGN_CODE
            )
    except Exception as error:
        raise explain_failure(source, error, revision=revision) from None
    is_loaded = False
    try:
        with quiet_transformers():
            _require(model, attention)
    except UnsupportedModelError as refusal:
        if refusal.__context__ is None or isinstance(refusal.__context__, PrefixkitError):
            raise  # refused by a rule
        # Its forward pass failed, perhaps only because it looks at numbers, of which there are none.
        model, is_loaded = load_base_model(source.name, revision=revision, attention=attention).model, True
        _require(model, attention)
    return model, is_loaded


def _require(model: PreTrainedModel, attention: Attention) -> None:
    """Refuse what `attach` would refuse."""
    anatomy = inspect_model(model)
    if attention is Attention.EAGER:
        for module in anatomy.attention:
            eager_attention(module)


def _stacks(anatomy: Anatomy, config: PretrainedConfig) -> tuple[Stack, ...]:
    stacks = []
    for placement in anatomy.geometry.placements:
        sites = [site for site in anatomy.geometry.sites if site.placement is placement]
        windows = enumerate(_windows(config, placement))
        windowed = {layer: window for layer, window in windows if window is not None and layer < len(sites)}
        stacks.append(
            Stack(
                placement=placement,
                layers=len(sites),
                query_heads=_distinct(site.query_heads for site in sites),
                kv_heads=_distinct(site.kv_heads for site in sites),
                head_dim=_distinct(site.head_dim for site in sites),
                numbers_per_token=sum(site.numbers_per_token for site in sites),
                windowed_layers=tuple(windowed),
                window_tokens=_distinct(windowed.values()),
            )
        )
    return tuple(stacks)


def _distinct(values: Any) -> tuple[int, ...]:
    return tuple(dict.fromkeys(values))


def _windows(config: PretrainedConfig, placement: Placement) -> list[int | None]:
    """Return each layer's window in a stack; cross-attention has none."""
    return [] if placement is Placement.CROSS else layer_windows(config)
