"""Everything that depends on a version of transformers stands here, and nowhere else."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prefixkit.errors import UnsupportedModelError

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]

#: transformers' own attention by torch's scaled_dot_product_attention.
sdpa_attention: AttentionFunction = sdpa_attention_forward


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


def eager_mask(*args: Any, **options: Any) -> Tensor:
    """Make the additive mask of transformers' eager attention, always.

    Eager attention takes its softmax in float32, where float64's smallest number is -inf, so that the rows of left
    padding, which may see nothing, and with them the whole text, would become NaN.
    """
    options |= {"allow_is_bidirectional_skip": False}
    mask: Tensor = masking_utils.eager_mask(*args, **options)
    return mask.clamp_min(hidden(mask.dtype))


def hidden(dtype: torch.dtype) -> float:
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


def cache_of(call: Mapping[str, Any]) -> Any:
    """Return the cache in the keyword arguments of a decoder stack's forward; None where there is none.

    transformers 5.24 renamed it from `past_key_values` to `cache`; what users pass is still taken under both names.
    """
    cache = call.get("cache")
    return call.get("past_key_values") if cache is None else cache


def cache_argument(stack: nn.Module, cache: Any) -> dict[str, Any]:
    """Return the keyword argument that hands a decoder stack's forward its cache, under the name it has there."""
    names = inspect.signature(stack.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}
