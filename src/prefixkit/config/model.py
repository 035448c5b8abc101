"""Settings of the frozen base model."""

from enum import StrEnum

from pydantic import Field, model_validator

from prefixkit.config.section import Section


class Dtype(StrEnum):
    """Number format of the base model's weights."""

    AUTO = "auto"
    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Attention(StrEnum):
    """Attention implementation of transformers that prefixkit prepends the prefix for."""

    SDPA = "sdpa"
    EAGER = "eager"
    FASTEST = "fastest"

    @property
    def loaded(self) -> str:
        """What a model is loaded with, in transformers' name; the fastest is only known once it is there."""
        return Attention.SDPA.value if self is Attention.FASTEST else self.value


class ModelConfig(Section):
    """Which base model to freeze, and how to load it."""

    base: str = Field("smollm2-135m", min_length=1)
    """A packaged model (smollm2-135m; all-minilm-l6-v2 to classify), a folder, a .gguf file, or a hub id like gpt2."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; the default branch if left out."""
    dtype: Dtype = Field(Dtype.AUTO, strict=False)
    """auto takes bfloat16 where the hardware computes it natively, else float32."""
    attention: Attention = Field(Attention.SDPA, strict=False)
    """sdpa takes the least memory; eager also returns attention weights; fastest times both before training, at the
    length of the recipe's texts, and trains with the faster."""
    shard: bool = False
    """Spread the layers over the processes of the run, each of which holds its part; alone, a process holds all."""

    @model_validator(mode="after")
    def _can_be_timed(self) -> "ModelConfig":
        if self.shard and self.attention is Attention.FASTEST:
            raise ValueError("attention=fastest is timed in one process, and shard spreads layers; give sdpa or eager")
        return self
