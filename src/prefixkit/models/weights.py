"""Where a model's weights are: in memory, quantised, or offloaded until a layer runs; and where its inputs go.

accelerate puts a layer's weights on the meta device and keeps them in memory or on disk; a hook on the layer brings
them back for as long as the layer runs. A quantised weight is a tensor subclass, or raw bytes with their scales beside
them. The fingerprint and the proof that nothing changed need the numbers themselves.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefixkit.compat import whole
from prefixkit.errors import ModelError
from prefixkit.models.quantised import keep_unpacked

_META = torch.device("meta")


def all_modules(model: nn.Module) -> list[nn.Module]:
    """Return a model's modules, each once: what `modules` yields, in another order and a twentieth of the time."""
    found, pending = {id(model): model}, [model]
    while pending:
        for child in pending.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                pending.append(child)
    return list(found.values())


def input_device(model: nn.Module) -> torch.device:
    """Return the device a model's inputs go to; for a model offloaded from its first weight on, where it is run."""
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    if device == _META:
        for module in model.modules():  # the model's own hook first; where that names no device, a layer's
            for hook in _hooks(module):
                runs_on = getattr(hook, "execution_device", None)
                if runs_on is not None and torch.device(runs_on) != _META:
                    return torch.device(runs_on)
    return device


def embedding_table(model: Any) -> Float[Tensor, "v e"]:
    """Return the weight of a model's input embedding."""
    weight: Tensor = model.get_input_embeddings().weight
    return weight


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are fetched by accelerate only while their layer runs."""
    return any(getattr(hook, "offload", False) for module in model.modules() for hook in _hooks(module))


def stored_weights(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Return a function per weight and buffer that gets it, offloaded or not; one at a time, so that it fits memory.

    Of weights that are spread over several processes all of them must ask, in the same order.

    Raises:
        ModelError: when called, a function whose weight has no numbers anywhere.
        UnsupportedModelError: bitsandbytes has rearranged its weights beyond repair.
    """
    keep_unpacked(model)  # before state_dict, which would have bitsandbytes put them back
    kept = {
        f"{path}.{name}" if path else name: (hook.weights_map, name)
        for path, module in model.named_modules()
        for hook in _hooks(module)
        if getattr(hook, "offload", False)
        for name in [name for name, _ in _tensors(module, recurse=hook.place_submodules)]
    }
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}

    def get(name: str, weight: Tensor) -> Tensor:
        for key in (name, tied.get(name, name)):
            where, local = kept.get(key, ({}, ""))
            try:
                return where[local].detach() if weight.is_meta else whole(weight.detach())
            except KeyError:  # a tied weight is kept once, under its other name
                continue
        raise ModelError(f"{type(model).__name__}: its weight {name} holds no numbers; load the model with its weights")

    return {name: lambda n=name, w=weight: get(n, w) for name, weight in model.state_dict().items()}  # type: ignore[misc]


def plain_parts(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the ordinary tensors a weight is made of, with names; an ordinary weight is its own only part."""
    if hasattr(weight, "__tensor_flatten__") and type(weight) not in (Tensor, nn.Parameter):
        names, _ = weight.__tensor_flatten__()
        for inner in sorted(names):
            yield from plain_parts(f"{name}.{inner}", getattr(weight, inner))
    else:
        yield name, weight.detach().as_subclass(Tensor)


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is at hand and can be computed with like any tensor: neither quantised nor offloaded."""
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and not weight.is_meta


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return []
    return list(getattr(hook, "hooks", (hook,)))


def _tensors(module: nn.Module, *, recurse: bool) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=recurse)
    yield from module.named_buffers(recurse=recurse)
