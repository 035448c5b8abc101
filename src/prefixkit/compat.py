"""Everything that depends on a version of transformers, torch or sacrebleu stands here, and nowhere else.

Names that they do not document, or say they may change, are touched in this module alone; a test looks for others. The
one exception is `training.trainer`, a subclass of transformers' Trainer that must override its methods by their names.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, masking_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from prefixkit.errors import UnsupportedModelError

#: What the hub's client raises where it cannot connect: of httpx or of its successor, whichever it was built on.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]

Module = TypeVar("Module", bound=nn.Module)
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]

#: transformers' own attention by torch's scaled_dot_product_attention.
sdpa_attention: AttentionFunction = sdpa_attention_forward


def attention_and_logsumexp(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return torch's attention on a processor, [b, h, t, d], and the logarithm of each softmax's sum, [b, h, t].

    Hidden keys get the smallest finite score: with -inf throughout, the kernel would say that a sum of nothing is 1.
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    elif mask is not None:
        mask = mask.clamp_min(torch.finfo(query.dtype).min)
    output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=mask, scale=scale
    )
    return output, logsumexp


#: How the names begin under which a configuration keeps the attention implementation, which `attach` sets.
ATTENTION_SETTING = "_attn_implementation"


def implementation_of(model: PreTrainedModel) -> str:
    """Return the name of the attention implementation a model runs with."""
    return model.config._attn_implementation  # type: ignore[no-any-return]


def attention_settings(model: PreTrainedModel) -> list[tuple[PretrainedConfig, Any]]:
    """Return every configuration in a model, and its attention implementation: a T5's stacks have their own."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for config in configs:  # grows under way
        parts = (getattr(config, name) for name in config.sub_configs)
        configs += [part for part in parts if part is not None and not any(part is known for known in configs)]
    return [(config, config._attn_implementation_internal) for config in configs]


def restore_attention(settings: Sequence[tuple[PretrainedConfig, Any]]) -> None:
    """Set every implementation back to what `attention_settings` found."""
    for config, implementation in settings:
        config._attn_implementation_internal = implementation


def layer_implementation(module: nn.Module, model: PreTrainedModel) -> str:
    """Return the name of the attention implementation one attention layer of a model runs with."""
    config = getattr(module, "config", model.config)
    return getattr(config, "_attn_implementation", implementation_of(model))


def uses_interface(model: PreTrainedModel) -> bool:
    """Whether a model asks transformers' registry of attention functions for its attention."""
    return model._can_set_attn_implementation()


def eager_attention(module: nn.Module) -> AttentionFunction:
    """Return the eager attention of the model family an attention layer belongs to.

    Raises:
        UnsupportedModelError: the family's module defines none.
    """
    family = sys.modules[type(module).__module__]
    function = getattr(family, "eager_attention_forward", None)
    if function is None:
        raise UnsupportedModelError(f"{type(module).__name__}: its family defines no eager attention; use sdpa")
    return function  # type: ignore[no-any-return]


def sdpa_mask(*args: Any, **options: Any) -> Tensor:
    """Make the boolean mask of transformers' sdpa, always.

    transformers may return None and rely on a causal flag; that flag is aligned to the upper left corner and so
    is wrong once columns are prepended.
    """
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = masking_utils.sdpa_mask(*args, **options)
    assert mask is not None
    return mask


def skipping_sdpa_mask(*args: Any, **options: Any) -> Tensor | None:
    """Make the mask of transformers' sdpa as transformers does: None where a causal flag, or no mask, will do."""
    return masking_utils.sdpa_mask(*args, **options)


def eager_mask(*args: Any, **options: Any) -> Tensor:
    """Make the additive mask of transformers' eager attention, always.

    Eager attention takes its softmax in float32, where float64's smallest number is -inf, so that the rows of left
    padding, which may see nothing, and with them the whole text, would become NaN.
    """
    options |= {"allow_is_bidirectional_skip": False}
    mask: Tensor = masking_utils.eager_mask(*args, **options)
    return mask.clamp_min(hidden_score(mask.dtype))


def hidden_score(dtype: torch.dtype) -> float:
    """Return what an additive mask of this dtype holds where nothing may be seen."""
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)


def layer_windows(config: PretrainedConfig) -> list[int | None]:
    """Return, layer by layer, how many tokens a sliding window or chunk lets a query see; None where it sees all.

    transformers' own reckoning, by the cache it would make for the model.
    """
    layers: list[Any] = DynamicCache(config=config).layers
    return [layer.sliding_window if getattr(layer, "is_sliding", False) else None for layer in layers]


def smallest_window(config: PretrainedConfig) -> int | None:
    """Return how many tokens the layer with the shortest sliding window or chunk sees; None if all see everything."""
    return min((window for window in layer_windows(config) if window is not None), default=None)


def rope_switch(config: PretrainedConfig) -> int | None:
    """Return beyond how many positions "longrope" turns all rotary angles at once to other frequencies; None if never.

    transformers takes the longest row of a forward pass for all of its rows.
    """
    config = config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else [kind for kind in parameters.values() if kind]
    switches = [
        kind.get("original_max_position_embeddings") or config.original_max_position_embeddings
        for kind in kinds
        if isinstance(kind, dict) and kind.get("rope_type") == "longrope"
    ]
    return min(switches, default=None)


def scale_switch(config: PretrainedConfig) -> int | None:
    """Return from how many tokens on Llama 4 scales attention by a count of its text alone; None for other models.

    It counts columns where others, such as Ministral 3, look at position ids.
    """
    config = config.get_text_config()
    if not getattr(config, "attn_temperature_tuning", False) or all(getattr(config, "no_rope_layers", None) or [1]):
        return None
    return int(config.floor_scale)


def cache_of(call: Mapping[str, Any]) -> Any:
    """Return the cache in the keyword arguments of a decoder stack's forward; None where there is none.

    transformers 5.24 renamed it from `past_key_values` to `cache`; what users pass is still taken under both names.
    """
    cache = call.get("cache")
    return call.get("past_key_values") if cache is None else cache


def cache_room(cache: Any) -> int | None:
    """Return how many tokens a static cache has room for; None for a cache that grows, and for none."""
    rooms = [getattr(layer, "max_cache_len", None) for layer in getattr(cache, "layers", ())]
    return max((room for room in rooms if room is not None), default=None)


def cache_argument(stack: nn.Module, cache: Any) -> dict[str, Any]:
    """Return the keyword argument that hands a decoder stack's forward its cache, under the name it has there."""
    names = inspect.signature(stack.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def keeps_keys_and_values(cache: Any, shapes: Sequence[torch.Size]) -> bool:
    """Whether all that a cache holds is, layer by layer, keys of these shapes and their values.

    Args:
        cache: what a forward pass returned.
        shapes: `[b, g, s, d]` of the keys each attention layer of the decoder's own text was given.
    """
    layers: list[Any] = list(getattr(cache, "self_attention_cache", cache).layers)
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return plain and [getattr(layer.keys, "shape", None) for layer in layers] == list(shapes)


def layer_overrides(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Return, layer by layer, the settings that differ between layers (Gemma 4's head size); empty if none does.

    Asked of the whole configuration, such a setting raises.
    """
    if not config.is_heterogeneous:
        return []
    names = sorted(config.per_layer_attributes or ())
    return [{name: getattr(layer, name) for name in ("skip", *names)} for layer in config.per_layer_config]


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether the model reads text both ways, as BERT does, and writes none."""
    if config.is_encoder_decoder or getattr(config, "is_decoder", False):
        return False
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def writes_text(config: PretrainedConfig) -> bool:
    """Whether there is a model of this kind that writes text; an encoder-decoder does from text."""
    if config.is_encoder_decoder:
        return config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def is_in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread; a checkpointed layer is then run again in it."""
    return torch._C._current_graph_task_id() != -1


def checkpoints_reentrantly(stack: nn.Module) -> bool:
    """Whether a stack's next forward pass will checkpoint layers, and by torch's reentrant kind."""
    for module in stack.modules():
        if getattr(module, "gradient_checkpointing", False) and module.training:
            function = getattr(module, "_gradient_checkpointing_func", None)
            return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
    return False


def leave_out_of_ddp(module: nn.Module, names: Sequence[str]) -> None:
    """Keep parameters and buffers out of what torch's DDP sends to all processes when it wraps a module.

    Frozen weights are the same everywhere already; sent, they would be written to, and no longer be shared by what has
    them mapped into memory.
    """
    module._ddp_params_and_buffers_to_ignore = list(names)  # type: ignore[assignment]


def trains_beside_its_base(kind: type[Module]) -> type[Module]:
    """Tell transformers' Trainer that models of a class train something else than the weights of their base."""
    setattr(kind, "_hf_peft_config_loaded", True)  # noqa: B010 - no attribute of the class as such
    return kind


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model or of a part of it of which gradient checkpointing keeps the input alone."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def keep_activations(layers: Iterable[nn.Module]) -> None:
    """Take some layers of a model out of its gradient checkpointing."""
    for layer in layers:
        layer.gradient_checkpointing = False  # type: ignore[assignment]


def refusal_of_tracker(name: str) -> str | None:
    """Say why transformers' Trainer cannot report to a tracker, such as ``wandb``; None if it can."""
    from transformers.integrations.integration_utils import (
        get_available_reporting_integrations,
        get_reporting_integration_callbacks,
    )

    try:
        get_reporting_integration_callbacks([name])
    except ValueError as error:
        return " ".join(str(error).split())
    if name not in get_available_reporting_integrations():
        return f"{name} is not installed; install it, or leave it out"
    return None


def is_shard(weight: Tensor) -> bool:
    """Whether a weight is one of which other processes hold parts; nothing is imported to know."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(weight, module.DTensor)


def own_part(weight: Tensor) -> Tensor:
    """Return what this process holds of a weight, itself and not a copy or view."""
    return weight._local_tensor if is_shard(weight) else weight  # type: ignore[attr-defined]


def whole(weight: Tensor) -> Tensor:
    """Return all of a weight; of a sharded one, all processes must ask."""
    return weight.full_tensor() if is_shard(weight) else weight  # type: ignore[attr-defined]


def cpu_attention_flops() -> dict[Any, Any]:
    """Return how torch's FLOP counter counts its fused attention on processors, which it does not know itself."""
    ops: Any = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))

    return {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def sentence_statistics(metric: Any, texts: Sequence[str], references: Sequence[Sequence[str | None]]) -> list[Any]:
    """Return what a metric of sacrebleu counts of each text; a set's score is that of the sums over its texts.

    Args:
        metric: sacrebleu's BLEU or CHRF.
        texts: what is measured.
        references: as sacrebleu wants them: the first reference of every text, then the second of every text...
    """
    return metric._extract_corpus_statistics(texts, references)  # type: ignore[no-any-return]


def score_of_statistics(metric: Any, sums: Sequence[int]) -> float:
    """Return a metric's score of summed statistics."""
    return float(metric._compute_score_from_stats(sums).score)
