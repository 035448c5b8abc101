"""BitFit (Ben Zaken et al., 2022): the bias terms alone are trained.

Families after GPT-3 have few biases or none. There the usual substitute is a bias on every linear layer, from 0 (as
LLaMA-Adapter V2, Gao et al., 2023, §3.1, unlocks it beside the norms).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.config import Biases, Method
from prefixkit.errors import UnsupportedModelError
from prefixkit.methods.delta import DeltaModule, Undo, training_dtype, undo_all
from prefixkit.methods.layers import linear_layers
from prefixkit.methods.overlay import OverlaidParameters
from prefixkit.models.weights import input_device

_CHOOSING = ("correction_bias", "expert_bias")
"""Added to the scores by which tokens choose their experts, and to nothing else: no loss has a gradient to them."""


def own_biases(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the bias terms of a model's stacks, without those of its output layer and those that choose experts."""
    head = model.get_output_embeddings()
    kept_out = set() if head is None else {id(parameter) for parameter in head.parameters()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.endswith("bias") and not name.endswith(_CHOOSING) and id(parameter) not in kept_out
    }


class BitFit(OverlaidParameters):
    """The model's own biases, those of its norms included.

    Args:
        model: the base model.

    Raises:
        UnsupportedModelError: it has none.
    """

    method = Method.BITFIT

    def __init__(self, model: PreTrainedModel) -> None:
        found = own_biases(model)
        if not found:
            raise UnsupportedModelError(
                f"bitfit: {type(model).__name__} has no biases; set method.biases=added for one on every linear layer"
            )
        super().__init__(model, found, {"biases": str(Biases.OWN)})


class AddedBiases(DeltaModule):
    """A bias on every linear layer inside the model's layers, from 0.

    Args:
        model: the base model.
    """

    method = Method.BITFIT

    def __init__(self, model: PreTrainedModel) -> None:
        found = list(linear_layers(model))
        dtype, device = training_dtype(model.dtype), input_device(model)
        named = {f"{name}.bias": nn.Parameter(torch.zeros(width, dtype=dtype, device=device))
                 for name, _, width in found}  # fmt: skip
        super().__init__(named, {"biases": str(Biases.ADDED)})
        self._modules_changed = [module for _, module, _ in found]

    def insert(self) -> Undo:
        """Hook each linear layer."""
        undoing: list[Undo] = [
            module.register_forward_hook(partial(_add, bias)).remove
            for module, bias in zip(self._modules_changed, self.numbers, strict=True)
        ]
        return partial(undo_all, undoing)


def _add(bias: Tensor, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + bias.to(output.device, output.dtype)


def bitfit(model: PreTrainedModel, *, biases: str) -> DeltaModule:
    """Return BitFit of one kind, or of the kind that suits the model.

    Args:
        model: the base model.
        biases: one of `Biases`.

    Raises:
        UnsupportedModelError: its own biases are asked for, and it has none.
    """
    kind = Biases(biases)
    if kind is Biases.AUTO:
        kind = Biases.OWN if own_biases(model) else Biases.ADDED
    return AddedBiases(model) if kind is Biases.ADDED else BitFit(model)
