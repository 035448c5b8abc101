"""Settings of the classification head, which formats classes and tags train beside the prefix."""

from enum import StrEnum

from pydantic import Field

from prefixkit.config.section import Section


class Pooling(StrEnum):
    """Which hidden state a whole text is labelled from."""

    TOKEN = "token"
    MEAN = "mean"
    LAST = "last"


class HeadConfig(Section):
    """A linear layer on the base model's last hidden states, trained together with the prefix."""

    pooling: Pooling = Field(Pooling.TOKEN, strict=False)
    """For format classes. token: the first token's hidden state in an encoder, the last one's in a decoder-only model;
    mean: the mean over the text, as sentence encoders were trained. last is for heads imported from PEFT alone: the
    last token's of a decoder-only model, with no end of text put behind it."""
    learning_rate: float = Field(1e-3, gt=0)
    """Its own peak rate of AdamW: a head's numbers are smaller than a prefix's, and move more slowly."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of the hidden state's numbers set to zero in each training step."""
