"""Weights of a model's own, trained as copies that stand in their place: fine-tuning, and BitFit.

The copies are float32 (or float64), the model reads them in its own number format: a module's weights are put in place
before each of its forward passes, so that gradient checkpointing finds them too.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.errors import UnsupportedModelError
from prefixkit.methods.delta import DeltaModule, Undo, training_dtype, undo_all
from prefixkit.models.weights import is_offloaded, is_plain


class OverlaidParameters(DeltaModule):
    """Copies of some of a model's parameters, from which they start.

    Args:
        model: the base model.
        wanted: the parameters, by name; one that stands in several places (a tied embedding) is named once.
        settings: as for `DeltaModule`.

    Raises:
        UnsupportedModelError: a parameter is quantised or offloaded.
    """

    def __init__(self, model: PreTrainedModel, wanted: Mapping[str, nn.Parameter], settings: Mapping[str, Any]) -> None:
        if is_offloaded(model):
            raise UnsupportedModelError(
                f"{self.method}: the base model is offloaded, and its weights cannot be trained; load it whole, or "
                "choose adapter"
            )
        for name, parameter in wanted.items():
            if not is_plain(parameter) or not parameter.is_floating_point():
                raise UnsupportedModelError(
                    f"{self.method}: {name} is quantised, and cannot be trained; load the base model unquantised, or "
                    "choose lora"
                )
        copies = {
            name: nn.Parameter(parameter.detach().to(training_dtype(parameter.dtype), copy=True))
            for name, parameter in wanted.items()
        }
        super().__init__(copies, settings)
        by_identity = {id(parameter): name for name, parameter in wanted.items()}
        self._places = [
            (module, key, by_identity[id(parameter)])
            for module in model.modules()
            for key, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in by_identity
        ]

    def touches(self, module: nn.Module | None) -> bool:
        """Whether a weight of the module is trained."""
        return any(place is module for place, _, _ in self._places)

    def insert(self) -> Undo:
        """Put the copies in place."""
        undoing: list[Undo] = []
        copies = self.named()
        by_module: dict[int, tuple[nn.Module, dict[str, tuple[Tensor, nn.Parameter]]]] = {}
        for module, key, name in self._places:
            own = module._parameters[key]
            assert own is not None
            by_module.setdefault(id(module), (module, {}))[1][key] = (own, copies[name])
        for module, placed in by_module.values():
            undoing.append(partial(_put, module, {key: own for key, (own, _) in placed.items()}))
            cast = _Cast(module, placed)
            cast()
            if any(copy.dtype != own.dtype for own, copy in placed.values()):
                undoing.append(module.register_forward_pre_hook(cast).remove)
        return partial(undo_all, undoing)


def _put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        module._parameters[key] = tensor  # type: ignore[assignment]


class _Cast:
    """Puts copies in place in the number format of the weights they stand for, with a gradient to the copies.

    Args:
        module: whose weights.
        placed: weights and the copies for them, by the module's name of them.
    """

    def __init__(self, module: nn.Module, placed: Mapping[str, tuple[Tensor, nn.Parameter]]) -> None:
        self._module, self._placed = module, placed
        self._versions: list[int] | None = None

    def __call__(self, *_: Any) -> None:
        """Do it before a forward pass, unless the copies are as they were and no gradient goes to them."""
        copies = [copy for _, copy in self._placed.values()]
        versions = [copy._version for copy in copies]
        if versions == self._versions and not any(copy.requires_grad for copy in copies):
            return
        self._versions = versions
        with torch.autocast(copies[0].device.type, enabled=False):
            _put(self._module, {key: copy.to(own.dtype) for key, (own, copy) in self._placed.items()})
