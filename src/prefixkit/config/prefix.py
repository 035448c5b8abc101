"""Settings of the prefix: its length, where it sits, how it is parameterised and where it starts."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field, model_validator

from prefixkit.config.section import Section


class Placement(StrEnum):
    """Which attention a stack of prefix states is prepended in."""

    DECODER_SELF = "decoder_self"
    ENCODER_SELF = "encoder_self"
    CROSS = "cross"


class Activation(StrEnum):
    """Non-linearity between the layers of the reparameterisation."""

    TANH = "tanh"
    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"


class InitKind(StrEnum):
    """Where the prefix starts."""

    TEXT = "text"
    WORDS = "words"
    RANDOM = "random"
    ZERO = "zero"
    PREFIX = "prefix"


class InitConfig(Section):
    """Where the prefix starts; a study in this repository ranks the kinds (text first)."""

    kind: InitKind = Field(InitKind.TEXT, strict=False)
    """text: the model's own keys and values of a text; words: of random vocabulary words; random: normal numbers;
    zero: zeros (not neutral: zeros still take attention; and without an MLP all virtual tokens of a layer stay alike);
    prefix: another saved prefix."""
    text: str | None = None
    """For kind text: the text. Left out, the run takes the beginning of its own training texts. A text longer than
    the prefix is cut at its end, a shorter one is repeated."""
    std: float = Field(0.02, gt=0)
    """For kind random: standard deviation of the normal numbers."""
    path: str | None = None
    """For kind prefix: the run or artefact folder to start from; it must have the same geometry."""
    scaled: bool = False
    """Count each layer's keys and values in units of their own size at the start, so that one learning rate suits all
    of them. Refused with the kinds random and zero, which start from no sizes of the model's."""
    orthogonal: bool = True
    """With reparameterisation: orthogonal weights, so that no virtual token's signal is lost or blown up."""

    @model_validator(mode="after")
    def _needs_what_the_kind_reads(self) -> "InitConfig":
        if self.kind is InitKind.PREFIX and not self.path:
            raise ValueError("kind prefix needs path, the run or artefact folder to start from")
        if self.scaled and self.kind in (InitKind.RANDOM, InitKind.ZERO):
            raise ValueError(f"scaled needs a start that has sizes, kind text, words or prefix; {self.kind} has none")
        if self.text is not None and not self.text.strip():
            raise ValueError("text is empty; write a sentence or leave it out")
        return self


class PrefixConfig(Section):
    """What is trained: a few virtual tokens in every attention layer."""

    num_virtual_tokens: int = Field(20, ge=1, le=4096)
    """Length of the prefix, in virtual tokens per layer."""
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=1)
    """Layers that get a prefix, counted from 0; all of them if left out."""
    layer_lengths: list[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=1)
    """One length per layer instead of num_virtual_tokens everywhere; 0 leaves a layer alone."""
    placement: list[Annotated[Placement, Field(strict=False)]] | None = Field(None, min_length=1)
    """Attention stacks that get a prefix; left out, every stack the base model has."""
    reparam_depth: int = Field(0, ge=0, le=3)
    """Layers of the MLP the prefix is trained through and which is folded away afterwards; 0 trains the keys and
    values themselves."""
    reparam_width: int = Field(512, ge=1)
    """Width of that MLP and of its table of virtual tokens."""
    reparam_activation: Activation = Field(Activation.TANH, strict=False)
    """Non-linearity of that MLP."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the prefix's keys and values set to zero in each training step."""
    gate: bool = False
    """A learned gate per head that starts at 0, so that step 0 equals the base model exactly. It costs a second
    attention, and a gated prefix cannot be exported as plain keys and values."""
    position_offset: int | None = Field(None, ge=0)
    """Position of the first text token; left out, the prefix's longest layer (the paper's and PEFT's choice), and 0
    with a gate, which is to start as the base model. Where there is an encoder, text keeps its positions: 0."""
    init: InitConfig = InitConfig()
    """Where the prefix starts."""

    @model_validator(mode="after")
    def _lengths_agree(self) -> "PrefixConfig":
        if self.layers is not None and self.layer_lengths is not None:
            raise ValueError("give layers or layer_lengths, not both (a length of 0 leaves a layer out)")
        if self.layers is not None and len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers names a layer twice: {self.layers}")
        if self.layer_lengths is not None and not any(self.layer_lengths):
            raise ValueError("layer_lengths is 0 everywhere: nothing would be trained")
        return self
