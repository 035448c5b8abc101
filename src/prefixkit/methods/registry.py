"""Every method that changes a model's layers, by name: made anew for training, or again from what was saved."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

from prefixkit.config import Method, MethodConfig
from prefixkit.errors import ArtefactError, ConfigError
from prefixkit.methods.adapter import BottleneckAdapter
from prefixkit.methods.bitfit import bitfit
from prefixkit.methods.delta import DeltaModule
from prefixkit.methods.fine_tuning import FullFineTuning, TopLayers
from prefixkit.prefix import Delta


def _lora(model: PreTrainedModel, **settings: Any) -> DeltaModule:
    from prefixkit.methods.peft_layers import Lora  # peft takes a second to import

    return Lora(model, **settings)


def _ia3(model: PreTrainedModel, **settings: Any) -> DeltaModule:
    from prefixkit.methods.peft_layers import Ia3

    return Ia3(model, **settings)


#: Every method is made from its settings, those of a recipe or those that were saved, by their names in a recipe. What
#: it draws comes from torch's own generator, as in PEFT.
_MAKERS: dict[Method, Callable[..., DeltaModule]] = {
    Method.LORA: _lora,
    Method.IA3: _ia3,
    Method.BITFIT: bitfit,
    Method.ADAPTER: BottleneckAdapter,
    Method.FULL: FullFineTuning,
    Method.TOP_LAYERS: TopLayers,
}

#: Default peak rates: the usual ones of each method's own paper and library for Adam; a sweep per task finds better.
_RATES: dict[Method, float] = {
    Method.LORA: 2e-3,
    Method.IA3: 1e-2,
    Method.BITFIT: 5e-3,
    Method.ADAPTER: 1e-3,
    Method.FULL: 5e-5,
    Method.TOP_LAYERS: 2e-4,
    Method.EMBEDDING: 1e-2,
    Method.PROMPT_TUNING: 1e-2,
    Method.P_TUNING: 1e-3,
}


#: Methods whose layers are PEFT's own.
_OF_PEFT = (Method.LORA, Method.IA3, Method.PROMPT_TUNING, Method.P_TUNING)


def check_installed(method: Method) -> None:
    """Refuse a method whose package is not installed, before anything is loaded for it.

    Raises:
        ConfigError: it is PEFT's, and there is none.
    """
    if method in _OF_PEFT and find_spec("peft") is None:
        raise ConfigError(f"method: {method} is PEFT's, which is not installed; pip install 'prefixkit[peft]'")


def build_delta(model: PreTrainedModel, config: MethodConfig, generator: torch.Generator) -> DeltaModule:
    """Return the trainable change a recipe asks for, at its start: the model computes what it computes without it.

    Args:
        model: the base model, with nothing attached.
        config: which method, and its settings.
        generator: draws the numbers it starts from.

    Raises:
        UnsupportedModelError: the model cannot take it; the message says why.
        ConfigError: a setting does not fit the model.
    """
    check_installed(config.kind)
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return _MAKERS[config.kind](model, **config.settings).made_for(model)


def restore_delta(model: PreTrainedModel, delta: Delta) -> DeltaModule:
    """Return a saved change, ready to be inserted; no gradient reaches it.

    Raises:
        ArtefactError: its layers are not the model's.
        ConfigError: its package is not installed.
        UnsupportedModelError: the model cannot take it.
    """
    if delta.method not in _MAKERS:
        raise ArtefactError(f"{delta.method}: not a change of a model's layers that this prefixkit knows; upgrade it")
    check_installed(Method(delta.method))
    settings: dict[str, Any] = dict(delta.settings)
    try:
        with torch.random.fork_rng():  # for numbers that are then replaced
            module = _MAKERS[delta.method](model, **settings).made_for(model)
    except ConfigError as error:
        raise ArtefactError(f"{delta.method}: {error}; load the base model it was trained on") from None
    except (TypeError, ValueError):
        raise ArtefactError(
            f"{delta.method}: this prefixkit does not know its settings {settings}; upgrade it"
        ) from None
    module.load(delta.tensors)
    module.requires_grad_(False)
    return module


def rate_of(config: MethodConfig) -> float:
    """Return the peak rate of AdamW for a method's own numbers: the one set, or the method's default."""
    return _RATES[config.kind] if config.learning_rate is None else config.learning_rate
