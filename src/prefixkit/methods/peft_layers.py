"""LoRA and IA3 as PEFT has them: its layers, put into a model and taken out again."""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

from peft import IA3Config, LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from prefixkit.config import Method
from prefixkit.errors import ConfigError, UnsupportedModelError
from prefixkit.methods.delta import DeltaModule, Undo, training_dtype, undo_all
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
        UnsupportedModelError: the model has adapters already.
    """

    def __init__(self, model: PreTrainedModel, config: LoraConfig | IA3Config, settings: Mapping[str, Any]) -> None:
        if has_adapters(model):
            raise UnsupportedModelError(
                f"{self.method}: the model has adapters of PEFT already; take them out with unload(), or attach a "
                "prefix without deltas"
            )
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        originals = dict(model.named_modules())
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT sets it right for GPT-2's Conv1D
                inject_adapter_in_model(config, model, adapter_name=_NAME)
        except ValueError as error:
            kind = model.config.model_type
            if config.target_modules is None:
                todo = "name the layers in method.targets" if self.method is Method.LORA else "choose lora"
                raise ConfigError(f"{self.method}: PEFT knows no layers to change in a {kind} model; {todo}") from None
            raise ConfigError(f"method.targets: {str(error).splitlines()[0]}") from None
        finally:  # some targets may be wrapped when it comes to one that cannot be
            found: list[tuple[str, Any]] = [
                (name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
            ]
            wrapped = [(*_parent(model, name), originals[name], module) for name, module in found]
            for parent, key, original, _ in wrapped:
                setattr(parent, key, original)
            vars(model).pop("peft_config", None)
            for parameter, requires in trained:
                parameter.requires_grad_(requires)
        named: dict[str, nn.Parameter] = {}
        for name, wrapper in found:
            for inner, parameter in wrapper.named_parameters():
                if not inner.startswith("base_layer."):
                    named[f"{name}.{inner.replace(f'.{_NAME}', '')}"] = parameter
                    parameter.data = parameter.data.to(training_dtype(parameter.dtype))
        super().__init__(named, settings)
        self._wrapped = wrapped

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


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


class Lora(PeftLayers):
    """LoRA (Hu et al., 2022): each target's weight W is read as W + (alpha / rank) B A; B starts at 0.

    Args:
        model: the base model.
        rank: of A and B.
        alpha: the numerator of the scale; None for twice the rank.
        dropout: of the target's input on the way through A.
        targets: ends of the targets' names; None for PEFT's for this kind of model.
    """

    method = Method.LORA

    def __init__(
        self, model: PreTrainedModel, *, rank: int, alpha: float | None, dropout: float, targets: list[str] | None
    ) -> None:
        alpha = 2.0 * rank if alpha is None else alpha
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)  # type: ignore[arg-type]
        settings = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": targets}
        super().__init__(model, config, settings)


class Ia3(PeftLayers):
    """IA3 (Liu et al., 2022): keys, values and the feed-forward network's inner activations are rescaled, from 1.

    Args:
        model: the base model, of a kind PEFT knows the places in.
    """

    method = Method.IA3

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, IA3Config(), {})
