"""Building what a recipe trains, at the place it starts from: a prefix, another method, a head for labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefixkit.config import Format, InitKind, Method, PrefixConfig, Recipe, TrainConfig
from prefixkit.data import Example
from prefixkit.errors import ArtefactError, ConfigError
from prefixkit.logs import get_logger
from prefixkit.methods import DeltaModule, SoftPrompt, build_delta, new_soft_prompt, rate_of
from prefixkit.models import Base
from prefixkit.models.fingerprint import check_base
from prefixkit.models.inspect import inspect_model, recomputable_layers
from prefixkit.models.reading import last_hidden_state
from prefixkit.models.text_states import text_states
from prefixkit.models.weights import embedding_table, input_device
from prefixkit.prefix import (
    ClassificationHead,
    Geometry,
    HeadKind,
    Prefix,
    PrefixEncoder,
    PrefixStates,
    distinct_tokens,
    init_mlp,
    init_random,
    init_zero,
    match_units,
    reproduce,
)
from prefixkit.seeding import derive
from prefixkit.training.model import Encoder, PrefixModel

log = get_logger(__name__)

#: Training texts a prefix may start from.
_STARTING = 64


def build_model(base: Base, examples: Sequence[Example], recipe: Recipe, classes: Sequence[str]) -> PrefixModel:
    """Return what is trained: a base model with a recipe's prefix or other method, and a head where labels are learned.

    Args:
        base: the frozen base model, with nothing attached.
        examples: what is to be learned from; with init kind text and no text given, the prefix starts from their
            beginning.
        recipe: how.
        classes: names of the labels to tell apart, where labels are learned.

    Raises:
        PrefixkitError: as for `build_encoder`, `build_soft_prompt`, `build_method` and `build_head`.
    """
    texts, method, seed = [example.text for example in examples[:_STARTING]], recipe.method, recipe.train.seed
    encoder: Encoder | None = None
    if method.has_prefix:
        encoder = build_encoder(base, recipe.prefix, seed=seed, texts=texts)
    elif method.kind.is_prompt:
        encoder = build_soft_prompt(base, method.kind, recipe.prefix, seed=seed, texts=texts)
    if encoder is not None and not (recipe.train.learning_rate if method.has_prefix else rate_of(method)):
        encoder.requires_grad_(False)
    delta = build_method(base, recipe) if method.kind.is_delta else None
    head = build_head(base, recipe, classes) if classes else None
    offset = recipe.prefix.position_offset if encoder is not None else None
    infix, recomputed = method.kind is Method.INFIX, _recomputed(base, recipe.train)
    return PrefixModel(base.model, encoder, offset, head, delta, infix=infix, recomputed=recomputed)


def _recomputed(base: Base, config: TrainConfig) -> int | None:
    """Return how many layers gradient checkpointing is limited to, None for no limit."""
    asked, layers = config.recomputed_layers, len(recomputable_layers(base.model))
    if config.gradient_checkpointing and not layers:
        raise ConfigError(f"train.gradient_checkpointing: {base.id} cannot recompute its layers; leave it out")
    if asked is not None and asked > layers:
        raise ConfigError(
            f"train.recomputed_layers: {asked}, and {base.id} has {layers}; leave it out to recompute all of them"
        )
    return asked


def build_method(base: Base, recipe: Recipe) -> DeltaModule:
    """Return the change of a base model's layers that a recipe asks for, at its start.

    Raises:
        UnsupportedModelError: the model cannot take it.
        ConfigError: a setting does not fit the model.
        ArtefactError: the artefact to start from cannot be read, has no numbers of this method, or others.
    """
    config = recipe.method
    delta = build_delta(base.model, config, torch.Generator().manual_seed(derive(recipe.train.seed, "method.init")))
    if config.start is not None:
        prefix = Prefix.load(config.start)
        check_base(base.model, prefix.card.base)
        saved = next((each for each in prefix.deltas if each.method is config.kind), None)
        if saved is None or _in_any_order(saved.settings) != _in_any_order(delta.settings):
            found = "none" if saved is None else f"it with {dict(saved.settings)}, the recipe asks for {delta.settings}"
            raise ArtefactError(f"method.start: {config.start}: expected a trained {config.kind}, found {found}")
        delta.load(saved.tensors)
    return delta.requires_grad_(rate_of(config) > 0)


def _in_any_order(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: sorted(value) if isinstance(value, list) else value for name, value in settings.items()}


def build_soft_prompt(
    base: Base, method: Method, config: PrefixConfig, *, seed: int, texts: Sequence[str]
) -> SoftPrompt:
    """Return a soft prompt for a base model, initialised; p-tuning starts as PEFT's network does.

    Args:
        base: the base model, with nothing attached.
        method: how the embeddings are trained.
        config: length, reparameterisation and start; a start from a text is from its words' embeddings.
        seed: the run's seed.
        texts: as for `build_encoder`.

    Raises:
        UnsupportedModelError: the model cannot take a soft prompt.
        ConfigError: a start that is none for embeddings.
    """
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    network_seed = derive(seed, "method.init") % 2**63
    prompt = new_soft_prompt(base.model, method, config, dtype=dtype, seed=network_seed)
    source, generator = prompt.source, torch.Generator().manual_seed(derive(seed, "prefix.init"))
    if isinstance(source, PrefixEncoder):
        init_mlp(source, generator, orthogonal=config.init.orthogonal)
    if method is not Method.P_TUNING:
        rows = _starting_embeddings(base, config, texts, generator)
        if isinstance(source, PrefixEncoder):
            target = PrefixStates.from_rows(source.geometry, rows.float())
            if config.init.scaled:
                match_units(source, target)
            reproduce(source, target)
        else:
            source.load_state_dict({"embedding.weight": rows})
    return prompt.to(input_device(base.model))


@torch.no_grad()
def _starting_embeddings(
    base: Base, config: PrefixConfig, texts: Sequence[str], generator: torch.Generator
) -> Float[Tensor, "p e"]:
    table, shape = embedding_table(base.model), (config.num_virtual_tokens, embedding_table(base.model).shape[1])
    match config.init.kind:
        case InitKind.RANDOM:
            return config.init.std * torch.randn(shape, generator=generator)
        case InitKind.ZERO:
            return torch.zeros(shape)
        case InitKind.WORDS:
            tokens = _random_words(base.tokenizer, shape[0], generator)
        case InitKind.TEXT:
            tokens = _text_tokens(base.tokenizer, config.init.text, shape[0], texts)
        case _:
            raise ConfigError("prefix.init.kind: a saved prefix holds no embeddings; start a soft prompt from text")
    layer: Any = base.model.get_input_embeddings()  # it may scale what stands in its table
    rows: Tensor = layer(tokens.to(table.device))
    return rows.cpu()


def build_encoder(base: Base, config: PrefixConfig, *, seed: int, texts: Sequence[str]) -> PrefixEncoder:
    """Return a prefix encoder for a base model, initialised.

    Args:
        base: the base model, with nothing attached.
        config: what to build.
        seed: the run's seed.
        texts: training texts; with init kind text and no text given, the prefix starts from their beginning.

    Raises:
        UnsupportedModelError: the model cannot take a prefix.
        ConfigError: a layer, a placement or a width does not fit the model.
        ArtefactError: the prefix to start from cannot be read, or belongs to another base model.
    """
    geometry = inspect_model(base.model).geometry
    lengths = prefix_lengths(geometry, config)
    encoder = PrefixEncoder(
        geometry,
        lengths,
        depth=config.reparam_depth,
        width=config.reparam_width,
        activation=config.reparam_activation,
        dropout=config.dropout,
        gated=config.gate,
        dtype=torch.float64 if base.dtype == torch.float64 else torch.float32,
    )
    generator = torch.Generator().manual_seed(derive(seed, "prefix.init"))
    init_mlp(encoder, generator, orthogonal=config.init.orthogonal)
    match config.init.kind:
        case InitKind.RANDOM:
            init_random(encoder, generator, std=config.init.std)
        case InitKind.ZERO:
            init_zero(encoder)
        case kind:
            target = _target_states(base, config, kind, max(lengths), texts, generator)
            if config.init.scaled:
                match_units(encoder, target)
            reproduce(encoder, target)
    if config.dropout == 0 and (apart := distinct_tokens(encoder)) < max(lengths):
        log.warning(
            "only %d of %d virtual tokens will learn apart: those that start alike get the same gradients and stay "
            "alike; take another prefix.init.kind, fewer tokens, or prefix.reparam_depth=1",
            apart,
            max(lengths),
        )
    return encoder.to(input_device(base.model))


@torch.no_grad()
def build_head(base: Base, recipe: Recipe, classes: Sequence[str]) -> ClassificationHead:
    """Return a classification head for a base model: its weights drawn at random, or those of the prefix to start from.

    Args:
        base: the base model, with nothing attached.
        recipe: what is learned, how, and the seed.
        classes: names of the labels to tell apart.

    Raises:
        UnsupportedModelError: the model has no hidden state to read.
    """
    token = torch.zeros(1, 1, dtype=torch.long, device=input_device(base.model))
    hidden = last_hidden_state(base.model, {"input_ids": token, "attention_mask": torch.ones_like(token)})
    head = ClassificationHead(
        HeadKind.TOKEN if recipe.data.format is Format.TAGS else HeadKind.SEQUENCE,
        tuple(classes),
        hidden.shape[-1],
        pooling=recipe.head.pooling,
        dropout=recipe.head.dropout,
        generator=torch.Generator().manual_seed(derive(recipe.train.seed, "head.init")),
        dtype=torch.float64 if base.dtype == torch.float64 else torch.float32,
    )
    if recipe.prefix.init.kind is InitKind.PREFIX:
        _take_over(head, recipe)
    return head.to(input_device(base.model))


def _take_over(head: ClassificationHead, recipe: Recipe) -> None:
    """Start from the head of the prefix the run starts from, if it is one for the same labels."""
    assert recipe.prefix.init.path is not None
    saved = Prefix.load(recipe.prefix.init.path).head
    if saved is None or (saved.kind, saved.labels, saved.pooling) != (head.kind, head.labels, head.pooling):
        log.info("%s: has no head that reads these labels in this way; the head starts anew", recipe.prefix.init.path)
        return
    head.load_state_dict({"weight": saved.weight, "bias": saved.bias})


def prefix_lengths(geometry: Geometry, config: PrefixConfig) -> tuple[int, ...]:
    """Return the number of virtual tokens per site that a recipe asks for.

    Raises:
        ConfigError: a layer or a placement does not exist in this model.
    """
    return geometry.lengths(
        config.num_virtual_tokens,
        layers=config.layers,
        layer_lengths=config.layer_lengths,
        placements=config.placement,
    )


def text_position(geometry: Geometry, recipe: Recipe) -> int:
    """Return the position of the first text token behind what a recipe trains.

    Raises:
        ConfigError: a layer or a placement does not exist in this model.
    """
    config, method = recipe.prefix, recipe.method
    if not method.has_prefix and not method.kind.is_prompt:
        return 0
    return geometry.text_position(prefix_lengths(geometry, config), is_gated=config.gate, asked=config.position_offset)


def _target_states(
    base: Base,
    config: PrefixConfig,
    kind: InitKind,
    length: int,
    texts: Sequence[str],
    generator: torch.Generator,
) -> PrefixStates:
    if kind is InitKind.PREFIX:
        assert config.init.path is not None
        prefix = Prefix.load(config.init.path)
        check_base(base.model, prefix.card.base)
        if not any(prefix.states.lengths):
            raise ConfigError(f"prefix.init.path: {config.init.path}: holds no virtual tokens to start from")
        geometry, asked = prefix.states.geometry, config.position_offset
        position = geometry.text_position(prefix_lengths(geometry, config), is_gated=config.gate, asked=asked)
        if not prefix.is_infix and prefix.position_offset != position:
            raise ConfigError(
                f"prefix.init.path: {config.init.path}: its text begins at position {prefix.position_offset}, this "
                f"recipe's at {position}; set prefix.position_offset={prefix.position_offset}"
            )
        return prefix.states
    if kind is InitKind.WORDS:
        tokens = _random_words(base.tokenizer, length, generator)
    else:
        tokens = _text_tokens(base.tokenizer, config.init.text, length, texts)
    return text_states(base.model, tokens)


def _text_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str | None, length: int, texts: Sequence[str]
) -> Int[Tensor, "p"]:
    """Return `length` tokens of the text, cut at the end or repeated."""
    if text is None:
        text = "\n".join(texts[:length])
        if not text:
            raise ConfigError("prefix.init.text: there are no training texts to start from; write a text")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not tokens:
        raise ConfigError("prefix.init.text: has no tokens for this model; write at least one word")
    repeats = -(-length // len(tokens))
    return torch.tensor((tokens * repeats)[:length])


def _random_words(tokenizer: PreTrainedTokenizerBase, length: int, generator: torch.Generator) -> Int[Tensor, "p"]:
    """Return random words of the vocabulary (Li & Liang, 2021, §7.4: real words, unrelated to the task)."""
    special = set(tokenizer.all_special_ids)
    vocabulary = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    return vocabulary[torch.randint(len(vocabulary), (length,), generator=generator)]
