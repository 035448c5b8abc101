"""Soft prompts: virtual tokens whose embeddings are trained, and nothing else.

The model itself turns the embeddings into keys and values, layer by layer, as it does with words; so after training a
soft prompt is an ordinary prefix, and everything that takes a prefix takes it. And as virtual tokens see nothing but
each other, their keys and values are computed once per step for the whole batch, where PEFT puts the embeddings before
every row. Three ways to train the embeddings:

    embedding       through the prefix's own encoder, whose only site is the embedding (Li & Liang, 2021, §7.2)
    prompt-tuning   by themselves (Lester et al., 2021), in PEFT's module
    p-tuning        through a small network (Liu et al., 2021), PEFT's module
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.config import Method, Placement, PrefixConfig
from prefixkit.errors import ConfigError, UnsupportedModelError
from prefixkit.models.inspect import Kind, inspect_model
from prefixkit.models.weights import embedding_table
from prefixkit.prefix import Geometry, PrefixEncoder, PrefixStates, Site


class SoftPrompt(nn.Module):
    """Trainable embeddings of virtual tokens; calling it returns them.

    Args:
        geometry: of the base model; all its sites get as many virtual tokens.
        length: `p`, virtual tokens.
        source: gives the embeddings: a `PrefixEncoder` over one site, or a module of PEFT.
    """

    def __init__(self, geometry: Geometry, length: int, source: nn.Module) -> None:
        super().__init__()
        self.geometry, self.length = geometry, length
        self.lengths = (length,) * len(geometry.sites)
        self.source = source

    def forward(self) -> Float[Tensor, "p e"]:
        """Return the embeddings, with gradients to the trained numbers."""
        if isinstance(self.source, PrefixEncoder):
            states: PrefixStates = self.source()
            return states.to_rows()
        places = torch.arange(self.length, device=next(self.source.parameters()).device)
        embeddings: Tensor = self.source(places)
        return embeddings.view(self.length, -1)

    @torch.no_grad()
    def materialise(self) -> Float[Tensor, "p e"]:
        """Return the embeddings as they are, without dropout."""
        was_training = self.training
        self.eval()
        try:
            embeddings: Tensor = self()
            return embeddings.detach().clone()
        finally:
            self.train(was_training)

    def num_parameters(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.parameters())


def embedding_geometry(width: int) -> Geometry:
    """Return a geometry of one site, whose key is the first half of an embedding of so many numbers."""
    return Geometry((Site(Placement.DECODER_SELF, 0, query_heads=1, kv_heads=1, head_dim=width // 2),))


def new_soft_prompt(
    model: PreTrainedModel, method: Method, config: PrefixConfig, *, dtype: torch.dtype, seed: int
) -> SoftPrompt:
    """Return a soft prompt that is not initialised yet; PEFT's network is, as PEFT does it.

    Args:
        model: the base model.
        method: which of the three.
        config: length and, for `Method.EMBEDDING`, the reparameterisation.
        dtype: number format of the parameters.
        seed: of PEFT's network.

    Raises:
        UnsupportedModelError: the model is no decoder-only one, or its embeddings have an odd size.
        ConfigError: the virtual tokens are more than its context.
    """
    anatomy = inspect_model(model)
    width, length = embedding_table(model).shape[1], config.num_virtual_tokens
    if anatomy.kind is not Kind.DECODER:
        raise UnsupportedModelError(
            f"{method}: {type(model).__name__} is no decoder-only model, so a soft prompt is not read once for all "
            "rows; choose prefix or lora"
        )
    if width % 2:
        raise UnsupportedModelError(f"{method}: embeddings of {width} numbers cannot be halved; choose another method")
    if anatomy.context_tokens is not None and length > anatomy.context_tokens:
        raise ConfigError(
            f"prefix.num_virtual_tokens: the model itself reads those of {method}, and its context is "
            f"{anatomy.context_tokens}; take fewer than {length}"
        )
    source: nn.Module
    if method is Method.EMBEDDING:
        source = PrefixEncoder(
            embedding_geometry(width),
            (length,),
            depth=config.reparam_depth,
            width=config.reparam_width,
            activation=config.reparam_activation,
            dropout=config.dropout,
            dtype=dtype,
        )
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            source = _peft_module(model, method, length, width)
        source.to(dtype)
    return SoftPrompt(anatomy.geometry, length, source)


def _peft_module(model: PreTrainedModel, method: Method, length: int, width: int) -> nn.Module:
    from peft import PromptEmbedding, PromptEncoder, PromptEncoderConfig, PromptTuningConfig  # takes a second

    if method is Method.P_TUNING:
        network = PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=length,
            token_dim=width,
            num_transformer_submodules=1,
            encoder_hidden_size=width,
        )
        return PromptEncoder(network)  # type: ignore[no-untyped-call]
    table = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=length, token_dim=width, num_transformer_submodules=1
    )
    return PromptEmbedding(table, model.get_input_embeddings())  # type: ignore[no-untyped-call]
