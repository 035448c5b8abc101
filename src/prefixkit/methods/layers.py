"""Where a model's layers and their parts are, by name."""

from collections.abc import Iterator

from torch import nn
from transformers import Conv1D, PreTrainedModel

from prefixkit.config import Placement
from prefixkit.errors import UnsupportedModelError
from prefixkit.models.inspect import Kind, inspect_model

_NETWORKS = ("mlp", "feed_forward", "block_sparse_moe")
#: Linear layers that a model defines itself, and which do what torch's does.
_PLAIN = ("FalconLinear", "EsmFoldLinear")


def layers_of(model: PreTrainedModel, *, every_stack: bool = False) -> dict[str, nn.Module]:
    """Return the layers of the stack that writes (of an encoder, those it has), by name, the first one first.

    A layer is the member of the outermost list of modules that an attention module stands in.

    Args:
        model: the base model.
        every_stack: of an encoder-decoder, those of both stacks.

    Raises:
        UnsupportedModelError: the model has no such list.
    """
    anatomy = inspect_model(model)
    wanted = Placement.ENCODER_SELF if anatomy.kind is Kind.ENCODER else Placement.DECODER_SELF
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, nn.Module] = {}
    for site, attention in zip(anatomy.geometry.sites, anatomy.attention, strict=True):
        if every_stack or site.placement is wanted:
            name = _layer_name(model, names[id(attention)])
            found[name] = model.get_submodule(name)
    return found


def _layer_name(model: nn.Module, attention: str) -> str:
    parts = attention.split(".")
    for depth in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList):
            return ".".join(parts[: depth + 1])
    raise UnsupportedModelError(f"{type(model).__name__}: {attention} stands in no list of layers")


def attention_in(model: PreTrainedModel, layer: nn.Module) -> nn.Module:
    """Return the attention module of a layer."""
    attention = inspect_model(model).attention
    own = set(map(id, layer.modules()))
    return next(module for module in attention if id(module) in own)


def network_in(model: PreTrainedModel, name: str, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return what reads the input of a layer's feed-forward network and what gives its output; often one module.

    Raises:
        UnsupportedModelError: it was not found.
    """
    for child in _NETWORKS:
        network = getattr(layer, child, None)
        if isinstance(network, nn.Module):
            return network, network
    first, last = getattr(layer, "fc1", None), getattr(layer, "fc2", None)  # OPT
    if isinstance(first, nn.Module) and isinstance(last, nn.Module):
        return first, last
    raise UnsupportedModelError(
        f"adapter: {type(model).__name__} has no feed-forward network that is known in {name} "
        f"({', '.join(_NETWORKS)}, or fc1 and fc2); choose another method or base model"
    )


def linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield the linear layers inside the layers of a model's stacks: name, module and width of the output."""
    for name, layer in layers_of(model, every_stack=True).items():
        for inner, module in layer.named_modules():
            if is_linear(module):
                yield f"{name}.{inner}", module, module.out_features
            elif isinstance(module, Conv1D):
                yield f"{name}.{inner}", module, module.nf


def is_linear(module: nn.Module) -> bool:
    """Whether a module does what torch's linear layer does; a model's own kind of it, such as a router, need not."""
    is_own = type(module).__module__.startswith("transformers.models.") and type(module).__name__ not in _PLAIN
    return isinstance(module, nn.Linear) and not is_own
