"""Which model is this? A fingerprint for refusing the wrong base, and a hash for proving nothing changed."""

import hashlib
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.compat import is_encoder
from prefixkit.errors import BaseMismatchError
from prefixkit.models.adapters import base_weights, is_merged
from prefixkit.models.quantised import is_quantised
from prefixkit.models.weights import plain_parts, stored_weights
from prefixkit.prefix import BaseCard

#: Numbers sampled from each weight for the fingerprint.
_SAMPLES = 512
#: Settings that change what the same weights compute.
_SETTINGS = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "activation_function",
    "hidden_activation", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_parameters",
    "rotary_pct", "partial_rotary_factor", "sliding_window", "layer_types", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling", "logit_scale",
    "use_parallel_residual", "do_layer_norm_before",
)  # fmt: skip

#: Those of encoder-decoders, beside the ones above; no other model's fingerprint depends on them.
_MORE_SETTINGS = (
    "scale_embedding", "feed_forward_proj", "relative_attention_num_buckets", "relative_attention_max_distance",
    "encoder_attention_heads", "decoder_attention_heads", "num_heads",
)  # fmt: skip

#: Per model object: the state its weights were in, and the fingerprint at that time.
_known: WeakKeyDictionary[PreTrainedModel, tuple[Hashable, str]] = WeakKeyDictionary()


def fingerprint(model: PreTrainedModel) -> str:
    """Return the identity of a model's configuration and weights; computed once, and again if weights change in place.

    Adapters in the model (LoRA beside a prefix) do not count, unless they are merged into its weights. Of an encoder
    its layers and embeddings count: one prefix fits it with any head, or with none.

    Weights are sampled evenly and rounded to bfloat16, so a model has one fingerprint in float64, float32 and
    bfloat16 (float16 rounds differently, and differs), and a 70B model is fingerprinted in seconds. Fine-tuned copies
    differ, and so does a quantised model: it computes something else. Where weights are offloaded to does not count.
    """
    state = _state(model)
    known = _known.get(model)
    if known is None or known[0] != state:
        known = _known[model] = (state, _digest(model, _sorted))
    return known[1]


def _digest(model: PreTrainedModel, write: Callable[[Any], Any]) -> str:
    """Return the fingerprint, with settings written in a certain way."""
    digest, config = hashlib.sha256(), model.config.get_text_config()
    for key in _SETTINGS:
        digest.update(f"{key}={write(getattr(config, key, None))!r};".encode())
    for key in _MORE_SETTINGS if model.config.is_encoder_decoder else ():
        digest.update(f"{key}={getattr(model.config, key, None)!r};".encode())
    for name, get in sorted(_weights(model).items()):
        for part, weight in plain_parts(name, get()):
            flat = weight.flatten()
            step = max(1, flat.numel() // _SAMPLES)
            sample = flat[::step].to("cpu", torch.bfloat16).contiguous()
            digest.update(f"{part}{tuple(weight.shape)}".encode())
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is(model: PreTrainedModel, expected: str) -> bool:
    """Whether this is a model's fingerprint, or was while settings were written in whatever order they stood."""
    return expected == fingerprint(model) or expected == _digest(model, lambda setting: setting)


def _sorted(setting: Any) -> Any:
    """Return a setting with its keys in order: a file keeps them in another order than a configuration just made."""
    return {key: _sorted(setting[key]) for key in sorted(setting)} if isinstance(setting, dict) else setting


def _weights(model: PreTrainedModel) -> dict[str, Callable[[], Tensor]]:
    weights = base_weights(model)
    if not is_encoder(model.config):
        return weights
    stem = "" if model.base_model is model else f"{model.base_model_prefix}."
    inner = {name.removeprefix(stem): get for name, get in weights.items() if name.startswith(stem)}
    return {name: get for name, get in inner.items() if not name.startswith("pooler.")}


def _state(model: PreTrainedModel) -> Hashable:
    """Return what changes whenever weights change in place: torch's counters and the first number of each weight.

    The counters alone miss changes through ``.data``, which is how PEFT merges adapters.
    """
    weights = list(model.parameters())
    # What merges an adapter into a quantised weight puts a new one in its place, with a counter of its own.
    packed = [id(weight) for weight in weights if type(weight) is not nn.Parameter and not weight.is_meta]
    parts = [part for weight in weights if not weight.is_meta for _, part in plain_parts("", weight) if part.numel()]
    return sum(weight._version for weight in weights), *packed, *(part[(0,) * part.dim()].item() for part in parts)


def weights_hash(model: PreTrainedModel) -> str:
    """Return the SHA-256 over every byte of every weight and buffer: equal before and after means frozen."""
    digest = hashlib.sha256()
    for name, get in sorted(stored_weights(model).items()):
        for part, weight in plain_parts(name, get()):
            digest.update(part.encode())
            digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_base(model: PreTrainedModel, base: BaseCard) -> None:
    """Check that a prefix belongs to this model.

    Raises:
        BaseMismatchError: the fingerprints differ.
    """
    if base.fingerprint is not None and not _is(model, base.fingerprint):
        at = f" at revision {base.revision}" if base.revision else ""
        todo = f"load that base model{at}"
        if is_merged(model):
            todo = "take the adapters merged into it out again with unmerge_adapter()"
        elif is_quantised(model):
            todo += " in the precision it was trained on: quantised the same way, or not at all"
        elif base.id == model.config.name_or_path:
            todo += " with the weights it had then, and quantised if they were"
        raise BaseMismatchError(
            f"this prefix was trained on {base.id} (fingerprint {base.fingerprint[:12]}), the model at hand is "
            f"{model.config.name_or_path or type(model).__name__} ({fingerprint(model)[:12]}); {todo}"
        )
