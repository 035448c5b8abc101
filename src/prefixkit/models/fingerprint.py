"""Which model is this? A fingerprint for refusing the wrong base, and a hash for proving nothing changed."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from ctypes import string_at
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.compat import is_encoder, own_part
from prefixkit.errors import BaseMismatchError
from prefixkit.models.adapters import base_weights, is_merged
from prefixkit.models.older_fingerprints import older_settings_of
from prefixkit.models.quantised import is_quantised
from prefixkit.models.settings import seen_settings, settings_of
from prefixkit.models.weights import all_modules, plain_parts, stored_weights
from prefixkit.prefix import BaseCard

#: Numbers sampled from each weight for the fingerprint.
_SAMPLES = 512


@dataclass(frozen=True)
class _Known:
    """A model's fingerprints, and the state they were taken in."""

    state: tuple[Any, ...]
    newest: str
    older: frozenset[str]


_known: WeakKeyDictionary[PreTrainedModel, _Known] = WeakKeyDictionary()


def fingerprint(model: PreTrainedModel) -> str:
    """Return the identity of a model's settings and weights, as they are now.

    All settings count but those that cannot change what the layers compute (`settings`). Adapters in the model (LoRA
    beside a prefix) do not count, unless they are merged into its weights. Of an encoder its layers and embeddings
    count: one prefix fits it with any head, or with none.

    Weights are sampled evenly and rounded to bfloat16, so a model has one fingerprint in float64, float32 and
    bfloat16 (float16 rounds differently, and differs), and a 70B model is fingerprinted in seconds. Fine-tuned copies
    differ, and so does a quantised model: it computes something else. Where weights are offloaded to does not count.
    """
    return _look(model).newest


def _look(model: PreTrainedModel) -> _Known:
    """Take a model's fingerprints, and remember them."""
    newest, *older = _digests(model, [settings_of(model), *older_settings_of(model)])
    known = _known[model] = _Known(_state(model), newest, frozenset(older))
    return known


def _fingerprints(model: PreTrainedModel) -> _Known:
    """Return what is remembered, as long as nothing seems to have changed since: attaching takes no look of its own."""
    known = _known.get(model)
    return known if known is not None and known.state == _state(model) else _look(model)


def _digests(model: PreTrainedModel, settings: Sequence[str]) -> list[str]:
    """Return a fingerprint per way to write the settings; the weights are read once."""
    digests = [hashlib.sha256(written.encode()) for written in settings]
    for name, get in sorted(_weights(model).items()):
        for part, weight in plain_parts(name, get()):
            flat = weight.flatten()
            step = max(1, flat.numel() // _SAMPLES)
            sample = flat[::step].to("cpu", torch.bfloat16).contiguous()
            for digest in digests:
                digest.update(f"{part}{tuple(weight.shape)}".encode())
                digest.update(sample.view(torch.uint8).numpy().tobytes())
    return [digest.hexdigest() for digest in digests]


def _weights(model: PreTrainedModel) -> dict[str, Callable[[], Tensor]]:
    weights = base_weights(model)
    if not is_encoder(model.config):
        return weights
    stem = "" if model.base_model is model else f"{model.base_model_prefix}."
    inner = {name.removeprefix(stem): get for name, get in weights.items() if name.startswith(stem)}
    return {name: get for name, get in inner.items() if not name.startswith("pooler.")}


def _state(model: PreTrainedModel) -> tuple[Any, ...]:
    """Return what changes with settings, modules or weights: of weights torch's counters, first and last numbers.

    The counters alone miss changes through ``.data``: that is how PEFT merges adapters, and how embeddings of added
    tokens, the last ones, are often set.
    """
    modules = all_modules(model)
    weights = [weight for module in modules for weight in module._parameters.values() if weight is not None]
    # What merges an adapter into a quantised weight puts a new one in its place, with a counter of its own; so does
    # what spreads a weight over several processes.
    packed = [id(weight) for weight in weights if type(weight) is not nn.Parameter and not weight.is_meta]
    held = [*map(own_part, weights)]
    counters = sum(weight._version for weight in held)
    return seen_settings(model.config), [*map(id, modules)], packed, counters, _end_numbers(held)


def _end_numbers(weights: Iterable[Tensor]) -> list[bytes | float]:
    """Return the first and last number of each weight that is at hand; as bytes where they can be read at once."""
    at_hand: list[bytes | float] = []
    elsewhere: list[Tensor] = []
    for weight in weights:
        if weight.is_cpu and type(weight) is nn.Parameter and weight.is_contiguous() and (count := weight.numel()):
            start, size = weight.data_ptr(), weight.itemsize
            at_hand += string_at(start, size), string_at(start + (count - 1) * size, size)
        elif not weight.is_meta:
            parts = (part for _, part in plain_parts("", weight) if part.numel())
            elsewhere += [part[(end,) * part.dim()].double() for part in parts for end in (0, -1)]
    return at_hand + (torch.stack(elsewhere).tolist() if elsewhere else [])


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
        BaseMismatchError: the prefix carries neither the model's fingerprint nor one it had in earlier releases.
    """
    if base.fingerprint is None:
        return
    known = _fingerprints(model)
    if base.fingerprint in {known.newest, *known.older}:
        return
    at = f" at revision {base.revision}" if base.revision else ""
    todo = f"load that base model{at}"
    if is_merged(model):
        todo = "take the adapters merged into it out again with unmerge_adapter()"
    elif is_quantised(model):
        todo += " in the precision it was trained on: quantised the same way, or not at all"
    elif base.id == model.config.name_or_path:
        todo += " with the weights and settings it had then, and quantised if they were"
    raise BaseMismatchError(
        f"this prefix was trained on {base.id} (fingerprint {base.fingerprint[:12]}), the model at hand is "
        f"{model.config.name_or_path or type(model).__name__} ({known.newest[:12]}); {todo}"
    )
