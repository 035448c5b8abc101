"""What kind of model a configuration describes: one that reads both ways, or one that writes."""

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from prefixkit.errors import UnsupportedModelError


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether the model reads text both ways, as BERT does, and writes none."""
    if config.is_encoder_decoder or getattr(config, "is_decoder", False):
        return False
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def require_language_model(base: str, config: PretrainedConfig) -> None:
    """Refuse whatever does not read text.

    Args:
        base: its name, for messages.
        config: its configuration.

    Raises:
        UnsupportedModelError: it reads something else, or turns text into something else.
    """
    kind = config.model_type
    if config.is_encoder_decoder:
        if kind not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
            raise UnsupportedModelError(f"{base}: {kind} does not turn text into text; give one that does, such as t5")
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not is_encoder(config):
        raise UnsupportedModelError(
            f"{base}: {kind} is no language model; give one that writes text left to right, or an encoder such as bert"
        )
