"""What a call of `generate` asks for and cannot have, under a prefix or on this machine: refused before it starts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from prefixkit.errors import InjectionError


def check_request(model: PreTrainedModel, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse settings of `generate` with which it would fail half-way, or answer what nobody asked.

    Args:
        model: the model.
        args: of `generate`.
        kwargs: of `generate`.

    Raises:
        InjectionError: guidance of an encoder-decoder, or a cache that is offloaded where there is no CUDA device.
    """
    cache = _setting(model, args, kwargs, "cache_implementation")
    if "offloaded" in str(cache) and not torch.cuda.is_available():
        raise InjectionError(
            f"cache_implementation: {cache!r} moves keys and values between a CUDA device and the CPU, and torch finds "
            "no CUDA device; leave it out"
        )
    if model.config.is_encoder_decoder and _setting(model, args, kwargs, "guidance_scale") not in (None, 1):
        raise InjectionError(
            "guidance_scale: transformers gives the encoder each new token in place of the source, under a mask for "
            "all of them, which no prefix can be put before; leave it out"
        )


def _setting(model: PreTrainedModel, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    """A setting of `generate` as transformers finds it: named, in the configuration given, or in the model's own."""
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    places = (kwargs.get(name), getattr(given, name, None), getattr(model.generation_config, name, None))
    return next((value for value in places if value is not None), None)
