"""Which model is this? A fingerprint for refusing the wrong base, and a hash for proving nothing changed."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.compat import is_encoder
from prefixkit.errors import BaseMismatchError
from prefixkit.models.adapters import base_weights, is_merged
from prefixkit.models.older_fingerprints import older_sample, older_settings_of
from prefixkit.models.quantised import is_quantised
from prefixkit.models.settings import settings_of
from prefixkit.models.watch import Watch
from prefixkit.models.weights import plain_parts, stored_weights
from prefixkit.prefix import BaseCard

#: Numbers sampled from each weight for the fingerprint.
_SAMPLES = 512
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class _Known:
    """A model's fingerprints, and a look at what it was when they were taken."""

    watch: Watch
    newest: str
    older: frozenset[str]


_known: WeakKeyDictionary[PreTrainedModel, _Known] = WeakKeyDictionary()


def fingerprint(model: PreTrainedModel) -> str:
    """Return the identity of a model's settings and weights, as they are now.

    All settings count but those that cannot change what the layers compute (`settings`). Adapters in the model (LoRA
    beside a prefix) do not count, unless they are merged into its weights. Of an encoder its layers and embeddings
    count: one prefix fits it with any head, or with none.

    Weights are sampled all over and rounded to bfloat16, so a model has one fingerprint in float64, float32 and
    bfloat16 (float16 rounds differently, and differs), and a 70B model is fingerprinted in seconds. Fine-tuned copies
    differ, and so does a quantised model: it computes something else. Where weights are offloaded to does not count.
    """
    return _look(model).newest


def _look(model: PreTrainedModel) -> _Known:
    """Take a model's fingerprints, and remember them."""
    settings = settings_of(model)
    ways = [(settings, sample), *((each, older_sample) for each in (settings, *older_settings_of(model)))]
    newest, *older = _digests(model, ways)
    known = _known[model] = _Known(Watch(model), newest, frozenset(older))
    return known


def _fingerprints(model: PreTrainedModel) -> _Known:
    """Return what is remembered, as long as nothing seems to have changed since: attaching takes no look of its own."""
    known = _known.get(model)
    return known if known is not None and known.watch.holds(model) else _look(model)


def _digests(model: PreTrainedModel, ways: Sequence[tuple[str, Callable[[Tensor], Tensor]]]) -> list[str]:
    """Return a fingerprint per way to write the settings and to sample a weight; the weights are read once."""
    digests = [hashlib.sha256(settings.encode()) for settings, _ in ways]
    for name, get in sorted(_weights(model).items()):
        for part, weight in plain_parts(name, get()):
            flat = weight.flatten()
            for digest, (_, choose) in zip(digests, ways, strict=True):
                digest.update(f"{part}{tuple(weight.shape)}".encode())
                numbers = choose(flat).to("cpu", torch.bfloat16).contiguous()
                digest.update(numbers.view(torch.uint8).numpy().tobytes())
    return [digest.hexdigest() for digest in digests]


def sample(flat: Tensor) -> Tensor:
    """Return numbers of a weight that lie all over its rows and columns: each a golden section of it behind the last.

    A step that the number of columns divides would see one column only, and a model whose other columns changed would
    pass for the same.
    """
    size = flat.numel()
    if size <= _SAMPLES:
        return flat
    step = int(size * _GOLDEN)
    while gcd(step, size) > 1:  # so that no place comes twice
        step += 1
    places = torch.arange(_SAMPLES, device=flat.device) * step % size
    return flat[places]


def _weights(model: PreTrainedModel) -> dict[str, Callable[[], Tensor]]:
    weights = base_weights(model)
    if not is_encoder(model.config):
        return weights
    stem = "" if model.base_model is model else f"{model.base_model_prefix}."
    inner = {name.removeprefix(stem): get for name, get in weights.items() if name.startswith(stem)}
    return {name: get for name, get in inner.items() if not name.startswith("pooler.")}


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
        f"this artefact was trained on {base.id} (fingerprint {base.fingerprint[:12]}), the model at hand is "
        f"{model.config.name_or_path or type(model).__name__} ({known.newest[:12]}); {todo}"
    )
