"""LoRA and IA3 as PEFT has them: its layers, put into a model and taken out again."""

import re
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

from peft import IA3Config, LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import Conv1D, PreTrainedModel

from prefixkit.config import Method
from prefixkit.errors import ConfigError, UnsupportedModelError
from prefixkit.methods.delta import DeltaModule, Undo, training_dtype, undo_all
from prefixkit.methods.layers import is_linear
from prefixkit.models.adapters import has_adapters

_NAME = "default"


class PeftLayers(DeltaModule):
    """Layers of PEFT around some of a model's own.

    Args:
        model: the base model, without adapters.
        config: PEFT's configuration.
        settings: as for `DeltaModule`.

    Raises:
        ConfigError: no layer of the model is among the targets, or PEFT knows no targets for this kind of model.
        UnsupportedModelError: the model has adapters already, or a layer to be changed is offloaded.
    """

    def __init__(self, model: PreTrainedModel, config: LoraConfig | IA3Config, settings: Mapping[str, Any]) -> None:
        if has_adapters(model):
            raise UnsupportedModelError(
                f"{self.method}: the model has adapters of PEFT already; take them out with unload(), or attach a "
                "prefix without deltas"
            )
        try:
            wrappers = _wrappers(model, config)
        except ValueError as error:
            raise self._refusal(model, config, error) from None
        named: dict[str, nn.Parameter] = {}
        for name, wrapper in wrappers.items():
            if isinstance(own := model.get_submodule(name), nn.Linear) and not is_linear(own):
                raise ConfigError(
                    f"method.targets: {name} is a {type(own).__name__}, which does more than a linear layer; leave "
                    f"{name.rpartition('.')[2]} out"
                )
            for inner, parameter in wrapper.named_parameters():
                if not inner.startswith("base_layer."):
                    if parameter.is_meta:  # as the weight beside it is until its layer runs
                        raise UnsupportedModelError(
                            f"{self.method}: {name} is offloaded, and PEFT's layers cannot be; load the base model "
                            "whole, or choose adapter"
                        )
                    named[f"{name}.{inner.replace(f'.{_NAME}', '')}"] = parameter
                    parameter.data = parameter.data.to(training_dtype(parameter.dtype))
        super().__init__(named, settings)
        self._wrapped = [(*_parent(model, name), model.get_submodule(name), it) for name, it in wrappers.items()]

    def _refusal(self, model: PreTrainedModel, config: LoraConfig | IA3Config, error: ValueError) -> ConfigError:
        """Say what kept PEFT from putting its layers in."""
        if config.target_modules is None:
            todo = "name the layers in method.targets" if self.method is Method.LORA else "choose lora"
            kind = model.config.model_type
            return ConfigError(f"{self.method}: PEFT knows no layers to change in a {kind} model; {todo}")
        found = re.match(r"Target module (\w+)", str(error))
        what = f"PEFT has no {self.method} for {found[1]}" if found else " ".join(str(error).split())
        return ConfigError(f"method.targets: {what}; name linear layers: {_linear(model)}")

    def touches(self, module: nn.Module | None) -> bool:
        """Whether the module is a target."""
        return any(original is module for _, _, original, _ in self._wrapped)

    def insert(self) -> Undo:
        """Put PEFT's layers around the model's."""
        undoing: list[Undo] = []
        for parent, key, original, wrapper in self._wrapped:
            wrapper.train(original.training)  # its dropout
            setattr(parent, key, wrapper)
            undoing.append(partial(setattr, parent, key, original))
        return partial(undo_all, undoing)


def _wrappers(model: PreTrainedModel, config: LoraConfig | IA3Config) -> dict[str, Any]:
    """Return PEFT's layers for a model by name of what each stands around; the model is as it was.

    Raises:
        ValueError: PEFT puts none around a target.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    originals = dict(model.named_modules())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT sets it right for GPT-2's Conv1D
            inject_adapter_in_model(config, model, adapter_name=_NAME)
    finally:  # some targets may be wrapped when it comes to one that cannot be
        found = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        for name in found:
            parent, key = _parent(model, name)
            setattr(parent, key, originals[name])
        vars(model).pop("peft_config", None)
        for parameter, requires in trained:
            parameter.requires_grad_(requires)
    return found


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def _linear(model: nn.Module) -> str:
    """Return the names of a model's linear layers."""
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return ", ".join(sorted({name.rpartition(".")[2] for name in linear}))


class Lora(PeftLayers):
    """LoRA (Hu et al., 2022): each target's weight W is read as W + (alpha / rank) B A; B starts at 0.

    Args:
        model: the base model.
        rank: of A and B.
        alpha: the numerator of the scale; None for twice the rank.
        dropout: of the target's input on the way through A.
        targets: ends of the targets' names; None for PEFT's for this kind of model.

    Raises:
        ConfigError: a target is the end of no name (PEFT leaves it out, and trains the others).
    """

    method = Method.LORA

    def __init__(
        self, model: PreTrainedModel, *, rank: int, alpha: float | None, dropout: float, targets: list[str] | None
    ) -> None:
        names = [f".{name}" for name, _ in model.named_modules()]
        for target in targets or ():
            if not any(name.endswith(f".{target}") for name in names):
                raise ConfigError(
                    f"method.targets: no layer's name ends in {target} in this {model.config.model_type} model; its "
                    f"linear layers are {_linear(model)}"
                )
        alpha = 2.0 * rank if alpha is None else alpha
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)  # type: ignore[arg-type]
        super().__init__(model, config, {"rank": rank, "alpha": alpha, "dropout": dropout})
        chosen = config.target_modules  # by PEFT, where none were given: another version may choose others
        if targets is None and chosen is not None and not isinstance(chosen, str):
            targets = sorted(chosen)
        self.settings["targets"] = targets


class Ia3(PeftLayers):
    """IA3 (Liu et al., 2022): keys, values and the feed-forward network's inner activations are rescaled, from 1.

    Args:
        model: the base model, of a kind PEFT knows the places in.
    """

    method = Method.IA3

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, IA3Config(), {})
