"""Bottleneck adapters: a small network behind or beside parts of each layer.

    h <- h + s * W_up relu(W_down h + b_down) + b_up          behind attention and feed-forward network (Houlsby et
                                                              al., 2019), or behind the latter alone (Pfeiffer et
                                                              al., 2021)
    FFN(x) <- FFN(x) + s * (W_up relu(W_down x + b_down) + b_up)       beside it (He et al., 2022: scaled parallel)

`W_up` and `b_up` start at 0, so that the model starts as it is.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.config import AdapterStyle, Method
from prefixkit.errors import UnsupportedModelError
from prefixkit.methods.delta import DeltaModule, Undo, training_dtype, undo_all
from prefixkit.methods.layers import attention_in, layers_of, network_in
from prefixkit.models.inspect import Kind, inspect_model
from prefixkit.models.weights import input_device

#: He et al. (2022), §4.1: the scale of a parallel adapter.
_PARALLEL_SCALE = 4.0
_PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")


class BottleneckAdapter(DeltaModule):
    """Adapters in every layer of a decoder-only model.

    Args:
        model: the base model.
        style: where they stand.
        bottleneck: `m`, width of the hidden layer.
        scale: `s`; None for 4 beside and 1 behind.

    `W_down` is drawn from torch's own generator, uniformly as in torch's linear layers.

    Raises:
        UnsupportedModelError: the model is no decoder-only one, or its parts are not known.
    """

    method = Method.ADAPTER

    def __init__(self, model: PreTrainedModel, *, style: str, bottleneck: int, scale: float | None) -> None:
        if inspect_model(model).kind is not Kind.DECODER:
            raise UnsupportedModelError(
                f"adapter: {type(model).__name__} is no decoder-only model, which adapters are for here; choose lora"
            )
        kind = AdapterStyle(style)
        if scale is None:
            scale = _PARALLEL_SCALE if kind is AdapterStyle.PARALLEL else 1.0
        places = _places(model, kind)
        width: int = model.config.get_text_config().hidden_size
        dtype, device = training_dtype(model.dtype), input_device(model)
        named: dict[str, nn.Parameter] = {}
        for name, _ in places:
            down = torch.empty(bottleneck, width, dtype=dtype).uniform_(-(width**-0.5), width**-0.5)
            parts = (down, torch.zeros(bottleneck), torch.zeros(width, bottleneck), torch.zeros(width))
            for part, tensor in zip(_PARTS, parts, strict=True):
                named[f"{name}.{part}"] = nn.Parameter(tensor.to(device, dtype))
        super().__init__(named, {"style": str(kind), "bottleneck": bottleneck, "scale": scale})
        self._places, self._scale, self._is_parallel = places, scale, kind is AdapterStyle.PARALLEL

    def insert(self) -> Undo:
        """Hook the parts of each layer."""
        numbers = list(self.numbers)
        undoing: list[Undo] = []
        for index, (_, module) in enumerate(self._places):
            own = numbers[len(_PARTS) * index : len(_PARTS) * (index + 1)]
            undoing.append(module.register_forward_hook(partial(self._change, own), with_kwargs=True).remove)
        return partial(undo_all, undoing)

    def _change(
        self, numbers: Sequence[Tensor], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        read = next(iter((*args, *kwargs.values()))) if self._is_parallel else hidden
        down, down_bias, up, up_bias = (number.to(hidden.device, hidden.dtype) for number in numbers)
        inner = nn.functional.relu(nn.functional.linear(read, down, down_bias))
        added = nn.functional.linear(inner, up, up_bias).view_as(hidden)  # experts give the rows of all texts in one
        changed = hidden + self._scale * added
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _places(model: PreTrainedModel, style: AdapterStyle) -> list[tuple[str, nn.Module]]:
    """Return the modules whose output an adapter changes, by name of the adapter."""
    places: list[tuple[str, nn.Module]] = []
    for name, layer in layers_of(model).items():
        first, last = network_in(model, name, layer)
        if style is AdapterStyle.HOULSBY:
            places.append((f"{name}.after_attention", attention_in(model, layer)))
        if style is AdapterStyle.PARALLEL and first is not last:
            raise UnsupportedModelError(
                f"adapter: the feed-forward network of {type(model).__name__} is no module of its own, so nothing "
                "stands beside it; set method.style to houlsby or pfeiffer"
            )
        places.append((f"{name}.{'beside' if style is AdapterStyle.PARALLEL else 'after'}_network", last))
    return places
