"""Which model is this? A fingerprint for refusing the wrong base, and a hash for proving nothing changed."""

import hashlib
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from prefixkit.errors import BaseMismatchError
from prefixkit.prefix import BaseCard

#: Numbers sampled from each weight for the fingerprint.
_SAMPLES = 512
#: Settings that change what the same weights compute.
_SETTINGS = ("model_type", "hidden_act", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta",
             "rope_parameters", "sliding_window", "layer_types")  # fmt: skip

_known: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


def fingerprint(model: PreTrainedModel) -> str:
    """Return the identity of a model's configuration and weights; computed once per model object.

    Weights are sampled evenly and rounded to bfloat16, so a model has one fingerprint in float32 and in
    bfloat16, and a 70B model is fingerprinted in seconds. Fine-tuned copies differ.
    """
    if model not in _known:
        digest = hashlib.sha256()
        for key in _SETTINGS:
            digest.update(f"{key}={getattr(model.config, key, None)!r};".encode())
        for name, weight in sorted(model.state_dict().items()):
            flat = weight.detach().flatten()
            step = max(1, flat.numel() // _SAMPLES)
            sample = flat[::step].to("cpu", torch.bfloat16).contiguous()
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            digest.update(sample.view(torch.uint8).numpy().tobytes())
        _known[model] = digest.hexdigest()
    return _known[model]


def weights_hash(model: PreTrainedModel) -> str:
    """Return the SHA-256 over every byte of every weight and buffer: equal before and after means frozen."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_base(model: PreTrainedModel, base: BaseCard) -> None:
    """Check that a prefix belongs to this model.

    Raises:
        BaseMismatchError: the fingerprints differ.
    """
    if base.fingerprint is not None and base.fingerprint != fingerprint(model):
        raise BaseMismatchError(
            f"this prefix was trained on {base.id} (fingerprint {base.fingerprint[:12]}), the model at hand is "
            f"{model.config.name_or_path or type(model).__name__} ({fingerprint(model)[:12]}); load that base model"
        )
