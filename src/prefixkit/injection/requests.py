"""What a call of `generate` asks for and cannot have, under a prefix or on this machine: refused before it starts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from prefixkit.errors import InjectionError


def check_request(
    model: PreTrainedModel, args: Sequence[Any], kwargs: Mapping[str, Any], *, rows: int | None, is_infix: bool
) -> None:
    """Refuse settings of `generate` with which it would fail half-way, or answer what nobody asked.

    Args:
        model: the model.
        args: of `generate`.
        kwargs: of `generate`.
        rows: how many prefixes are attached, one per row; None for one that all rows read.
        is_infix: it stands behind the prompt.

    Raises:
        InjectionError: guidance of an encoder-decoder or under an infix, early exit under one, times of Whisper's
            words, rows of their own under a decoding of the caller's, or a cache that is offloaded where there is no
            CUDA device.
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
    for name, nothing in (("guidance_scale", 1), ("assistant_early_exit", None)):
        if is_infix and _setting(model, args, kwargs, name) not in (None, nothing):
            raise InjectionError(
                f"{name}: reads other prompts, or fewer layers, beside the model's own, and an infix would stand at "
                "the wrong place there; leave it out"
            )
    if _setting(model, args, kwargs, "return_token_timestamps"):
        raise InjectionError(
            "return_token_timestamps: they are read off the attention to the recording, in which the prefix stands in "
            "front; leave it out, or detach first"
        )
    if rows not in (None, 1) and kwargs.get("custom_generate") is not None:
        raise InjectionError(
            "custom_generate: in which order it repeats rows is not known, so neither is which prefix each reads; "
            "attach one prefix for all rows"
        )


def _setting(model: PreTrainedModel, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    """A setting of `generate` as transformers finds it: named, in the configuration given, or in the model's own."""
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    places = (kwargs.get(name), getattr(given, name, None), getattr(model.generation_config, name, None))
    return next((value for value in places if value is not None), None)
