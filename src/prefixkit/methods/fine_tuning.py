"""Full fine-tuning, and fine-tuning of the last layers alone (Li & Liang, 2021, §5.2: FT-TOP2)."""

from transformers import PreTrainedModel

from prefixkit.config import Method
from prefixkit.errors import ConfigError
from prefixkit.methods.layers import layers_of
from prefixkit.methods.overlay import OverlaidParameters


class FullFineTuning(OverlaidParameters):
    """All weights of the model, a tied output embedding included.

    Args:
        model: the base model.
    """

    method = Method.FULL

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, dict(model.named_parameters()), {})


class TopLayers(OverlaidParameters):
    """All weights of the last layers.

    Args:
        model: the base model.
        top_layers: how many.

    Raises:
        ConfigError: the model has fewer.
    """

    method = Method.TOP_LAYERS

    def __init__(self, model: PreTrainedModel, *, top_layers: int) -> None:
        layers = layers_of(model)
        if top_layers > len(layers):
            raise ConfigError(f"method.top_layers: expected at most the model's {len(layers)} layers, got {top_layers}")
        last = list(layers)[-top_layers:]
        wanted = {f"{name}.{inner}": weight for name in last for inner, weight in layers[name].named_parameters()}
        super().__init__(model, wanted, {"top_layers": top_layers})
