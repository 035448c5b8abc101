"""A new prefix encoder for PEFT's configuration. It draws from torch's global generator, as PEFT does."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.config import InitKind, Placement
from prefixkit.errors import ConfigError
from prefixkit.models.inspect import inspect_model
from prefixkit.models.text_states import text_states
from prefixkit.models.weights import embedding_table, input_device
from prefixkit.peft.config import DEFAULT_PLACEMENT, PrefixTuningConfig
from prefixkit.peft.loading import require_task
from prefixkit.prefix import PrefixEncoder, init_mlp, init_zero, reproduce


def new_encoder(
    model: PreTrainedModel, config: PrefixTuningConfig, init_token_ids: Sequence[int] | Tensor | None
) -> PrefixEncoder:
    """Return an encoder in float32, initialised, on the model's device.

    Args:
        model: the base model, with nothing attached.
        config: what to build.
        init_token_ids: tokens to start from, cut or repeated to the prefix's length; random words if None.

    Raises:
        UnsupportedModelError: the model cannot take a prefix, or is an encoder.
        ConfigError: the configuration names sizes the model does not have, or contradicts `init_token_ids`.
    """
    task = require_task(model)
    if config.task_type is not task:
        raise ConfigError(f"task_type: expected {task} for {type(model).__name__}, got {config.task_type}")
    geometry = inspect_model(model).geometry
    placements = config.placement or DEFAULT_PLACEMENT
    layers = [site for site in geometry.sites if site.placement is Placement.DECODER_SELF]  # those PEFT speaks of
    site = layers[0]
    for key, expected in (
        ("num_layers", len(layers)),
        ("num_attention_heads", site.kv_heads),
        ("token_dim", site.kv_heads * site.head_dim),
    ):
        if getattr(config, key) not in (None, expected):
            raise ConfigError(f"{key}: this model has {expected}, got {getattr(config, key)}; leave it out")
    settings = config.to_prefix_config(site.kv_heads * site.head_dim)
    p, width = settings.num_virtual_tokens, settings.reparam_width
    if settings.reparam_depth and width < p and settings.init.kind is InitKind.WORDS:
        raise ConfigError(
            f"encoder_hidden_size: {width} is too narrow for {p} virtual tokens to start from words; "
            f'use at least {p}, leave it out, or take init_weights="random"'
        )
    encoder = PrefixEncoder(
        geometry,
        geometry.lengths(p, placements=placements),
        depth=settings.reparam_depth,
        width=width,
        activation=settings.reparam_activation,
    )
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    if init_token_ids is not None and config.init_weights is not None:
        raise ConfigError(f"init_token_ids: contradicts init_weights={config.init_weights!r}; leave one of them out")
    if settings.init.kind is InitKind.WORDS and model.main_input_name != "input_ids":
        raise ConfigError(
            f"init_weights: {type(model).__name__} reads {model.main_input_name}, no words a prefix could start from; "
            'take "random"'
        )
    if settings.init.kind is InitKind.RANDOM:
        _start_as_peft(encoder, generator)
    else:
        init_mlp(encoder, generator)
        if settings.init.kind is InitKind.ZERO:
            init_zero(encoder)
        else:
            reproduce(encoder, text_states(model, _tokens(model, init_token_ids, p, generator)))
    return encoder.to(input_device(model))


def _tokens(model: PreTrainedModel, given: Sequence[int] | Tensor | None, p: int, generator: torch.Generator) -> Tensor:
    """Return `p` tokens: those given, cut or repeated, or random ones that are not special."""
    if given is not None:
        tokens = torch.as_tensor(given, dtype=torch.long).flatten().cpu()
        if not len(tokens):
            raise ConfigError("init_token_ids: holds no tokens; give at least one, or leave it out")
        known = len(embedding_table(model))
        if unknown := [token for token in tokens.tolist() if not 0 <= token < known]:
            raise ConfigError(f"init_token_ids: this model has tokens 0 to {known - 1}, got {unknown[0]}")
        return tokens[torch.arange(p) % len(tokens)]
    config = model.config.get_text_config()
    named = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    special = {token for each in named for token in (each if isinstance(each, list) else [each])}
    vocabulary = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    return vocabulary[torch.randint(len(vocabulary), (p,), generator=generator)]


@torch.no_grad()
def _start_as_peft(encoder: PrefixEncoder, generator: torch.Generator) -> None:
    """Draw what `nn.Embedding` and `nn.Linear` draw: normal numbers, and uniform ones up to ``1 / sqrt(inputs)``."""
    for table in [encoder.table] if encoder.depth else list(encoder.states):
        table.copy_(torch.randn(table.shape, generator=generator))
    for layer in encoder.modules():
        if isinstance(layer, nn.Linear):
            for parameter in layer.parameters():
                parameter.uniform_(-(layer.in_features**-0.5), layer.in_features**-0.5, generator=generator)
