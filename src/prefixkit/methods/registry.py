"""Every method that changes a model's layers, by name: made anew for training, or again from what was saved."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from prefixkit.config import Method, MethodConfig
from prefixkit.errors import ArtefactError
from prefixkit.methods.adapter import BottleneckAdapter
from prefixkit.methods.bitfit import bitfit, bitfit_from_config
from prefixkit.methods.delta import DeltaModule
from prefixkit.methods.fine_tuning import FullFineTuning, TopLayers
from prefixkit.prefix import Delta


def _lora(model: PreTrainedModel, **settings: Any) -> DeltaModule:
    from prefixkit.methods.peft_layers import Lora  # peft takes a second to import

    return Lora(model, **settings)


def _ia3(model: PreTrainedModel, **settings: Any) -> DeltaModule:
    from prefixkit.methods.peft_layers import Ia3

    return Ia3(model, **settings)


def _lora_settings(config: MethodConfig) -> dict[str, Any]:
    alpha = 2.0 * config.rank if config.alpha is None else config.alpha
    return {"rank": config.rank, "alpha": alpha, "dropout": config.dropout, "targets": config.targets}


@dataclass(frozen=True)
class _Entry:
    """How one method is made.

    Attributes:
        new: from a recipe, with a generator to draw from.
        again: from its settings, to be filled with saved numbers.
        rate: default peak rate of AdamW.
    """

    new: Callable[[PreTrainedModel, MethodConfig, torch.Generator], DeltaModule]
    again: Callable[..., DeltaModule]
    rate: float


#: The rates are the usual ones of each method's own paper and library for Adam; a sweep per task finds better ones.
_ENTRIES: dict[Method, _Entry] = {
    Method.LORA: _Entry(lambda model, config, _: _lora(model, **_lora_settings(config)), _lora, 2e-3),
    Method.IA3: _Entry(lambda model, config, _: _ia3(model), _ia3, 1e-2),
    Method.BITFIT: _Entry(lambda model, config, _: bitfit_from_config(model, config), bitfit, 5e-3),
    Method.ADAPTER: _Entry(BottleneckAdapter.from_config, BottleneckAdapter, 1e-3),
    Method.FULL: _Entry(lambda model, config, _: FullFineTuning.from_config(model, config), FullFineTuning, 5e-5),
    Method.TOP_LAYERS: _Entry(lambda model, config, _: TopLayers.from_config(model, config), TopLayers, 2e-4),
}

_PROMPT_RATES = {Method.EMBEDDING: 1e-2, Method.PROMPT_TUNING: 1e-2, Method.P_TUNING: 1e-3}


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
    with torch.random.fork_rng():  # PEFT draws from torch's own
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return _ENTRIES[config.kind].new(model, config, generator).made_for(model)


def restore_delta(model: PreTrainedModel, delta: Delta) -> DeltaModule:
    """Return a saved change, ready to be inserted; no gradient reaches it.

    Raises:
        ArtefactError: its layers are not the model's.
        UnsupportedModelError: the model cannot take it.
    """
    if delta.method not in _ENTRIES:
        raise ArtefactError(f"{delta.method}: not a change of a model's layers that this prefixkit knows; upgrade it")
    settings: dict[str, Any] = dict(delta.settings)
    try:
        with torch.random.fork_rng():  # PEFT draws numbers that are then replaced
            module = _ENTRIES[delta.method].again(model, **settings).made_for(model)
    except (TypeError, ValueError):
        raise ArtefactError(
            f"{delta.method}: this prefixkit does not know its settings {settings}; upgrade it"
        ) from None
    module.load(delta.tensors)
    module.requires_grad_(False)
    return module


def rate_of(config: MethodConfig) -> float:
    """Return the peak rate of AdamW for a method's own numbers: the one set, or the method's default."""
    if config.learning_rate is not None:
        return config.learning_rate
    return _ENTRIES[config.kind].rate if config.kind in _ENTRIES else _PROMPT_RATES[config.kind]
