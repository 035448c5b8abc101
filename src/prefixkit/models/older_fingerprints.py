"""How fingerprints were made before: prefixes that carry one are still accepted. What stands here is never changed.

Until all settings counted (`settings`), those listed here did, first in the order their keys stood in, then sorted.
Weights are sampled all over now; they were at even steps, which mostly lie in one column.
"""

from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.compat import layer_overrides
from prefixkit.models.settings import sorted_keys

_SETTINGS = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "activation_function",
    "hidden_activation", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_parameters",
    "rotary_pct", "partial_rotary_factor", "sliding_window", "layer_types", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling", "logit_scale",
    "use_parallel_residual", "do_layer_norm_before",
)  # fmt: skip
#: Those of encoder-decoders, beside the ones above.
_MORE_SETTINGS = (
    "scale_embedding", "feed_forward_proj", "relative_attention_num_buckets", "relative_attention_max_distance",
    "encoder_attention_heads", "decoder_attention_heads", "num_heads",
)  # fmt: skip


_SAMPLES = 512


def older_sample(flat: Tensor) -> Tensor:
    """Return the numbers of a flat weight that older fingerprints looked at."""
    return flat[:: max(1, flat.numel() // _SAMPLES)]


def older_settings_of(model: PreTrainedModel) -> list[str]:
    """Return what older fingerprints covered of a model's settings, newest first; none, if it could not have one."""
    if layer_overrides(model.config.get_text_config()):
        return []  # a setting that differs from layer to layer could not be read
    return [_written(model, is_sorted=True), _written(model, is_sorted=False)]


def _written(model: PreTrainedModel, *, is_sorted: bool) -> str:
    config = model.config.get_text_config()
    settings = {key: getattr(config, key, None) for key in _SETTINGS}
    found = [f"{key}={sorted_keys(value) if is_sorted else value!r};" for key, value in settings.items()]
    if model.config.is_encoder_decoder:
        found += [f"{key}={getattr(model.config, key, None)!r};" for key in _MORE_SETTINGS]
    return "".join(found)
