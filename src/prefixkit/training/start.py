"""Building the prefix a recipe asks for, at the place it asks to start from; and the head, where labels are learned."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefixkit.config import Format, InitKind, PrefixConfig, Recipe
from prefixkit.data import Example
from prefixkit.errors import ConfigError
from prefixkit.logs import get_logger
from prefixkit.models import Base
from prefixkit.models.fingerprint import check_base
from prefixkit.models.inspect import inspect_model
from prefixkit.models.reading import last_hidden_state
from prefixkit.models.text_states import text_states
from prefixkit.models.weights import input_device
from prefixkit.prefix import (
    ClassificationHead,
    Geometry,
    HeadKind,
    Prefix,
    PrefixEncoder,
    PrefixStates,
    init_mlp,
    init_random,
    init_zero,
    match_units,
    reproduce,
)
from prefixkit.seeding import derive
from prefixkit.training.model import PrefixModel

log = get_logger(__name__)

#: Training texts a prefix may start from.
_STARTING = 64


def build_model(base: Base, examples: Sequence[Example], recipe: Recipe, classes: Sequence[str]) -> PrefixModel:
    """Return what is trained: a base model with a recipe's prefix attached, and a head where labels are learned.

    Args:
        base: the frozen base model, with nothing attached.
        examples: what is to be learned from; with init kind text and no text given, the prefix starts from their
            beginning.
        recipe: how.
        classes: names of the labels to tell apart, where labels are learned.

    Raises:
        PrefixkitError: as for `build_encoder` and `build_head`.
    """
    texts = [example.text for example in examples[:_STARTING]]
    encoder = build_encoder(base, recipe.prefix, seed=recipe.train.seed, texts=texts)
    head = build_head(base, recipe, classes) if classes else None
    return PrefixModel(base.model, encoder, recipe.prefix.position_offset, head)


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
