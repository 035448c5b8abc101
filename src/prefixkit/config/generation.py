"""Settings of text generation."""

from pydantic import Field

from prefixkit.config.section import Section


class GenerationConfig(Section):
    """How text is sampled."""

    max_new_tokens: int = Field(80, ge=1)
    """Longest continuation, in tokens."""
    temperature: float = Field(0.9, ge=0)
    """0 takes the likeliest token; 1 samples from the model as it is."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability mass."""
    top_k: int | None = Field(None, ge=1)
    """Sample from this many likeliest tokens."""
    repetition_penalty: float = Field(1.0, ge=1)
    """Above 1, tokens already in the text become less likely."""
    batch_size: int = Field(64, ge=1)
    """Texts generated together."""
