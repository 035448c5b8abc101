"""Can this model take a prefix, and how? The model itself is asked.

transformers 5.x sends attention through one registry of functions. `inspect_model` runs a few tokens through the
model and watches: which modules call the registry, in which stack, and with how many heads, of what size, is the
geometry. No size is read from configuration keys, whose names differ from family to family.
"""

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.compat import checkpointed_layers, implementation_of, rope_switch, scale_switch, uses_interface
from prefixkit.config import Placement
from prefixkit.errors import UnsupportedModelError
from prefixkit.models.admission import check_cache, check_calls, counts_by_mask
from prefixkit.models.probe import AttentionCall, Watched, watch_attention
from prefixkit.models.quantised import keep_unpacked
from prefixkit.models.weights import all_modules, input_device, is_offloaded
from prefixkit.prefix import Geometry, Site

#: transformers' attention implementations that a prefix can be prepended for.
IMPLEMENTATIONS = ("sdpa", "eager")
#: Tokens of the probe. They differ, so that the length of its keys tells a cross-attention from a self-attention.
_SOURCE_TOKENS, _TARGET_TOKENS = 3, 2


class Kind(StrEnum):
    """How a model is built."""

    DECODER = "decoder"
    ENCODER = "encoder"
    ENCODER_DECODER = "encoder-decoder"


@dataclass(frozen=True)
class Anatomy:
    """What prefixkit needs to know of a model.

    Attributes:
        kind: which stacks it has.
        geometry: the sites that can take a prefix, in the order the model runs them.
        attention: the attention module of each site.
        stacks: the modules whose forward receives a batch's rows: the decoder, the encoder, or encoder and decoder.
        root: the innermost module that runs all stacks; the stack itself where there is one.
        context_tokens: positions the model was made for; None if it sets no limit.
        counts_by_mask: text without position ids is numbered by its attention mask (OPT), not by columns. Not known of
            a model without weights (on the meta device).
        rope_switch: beyond so many positions all rotary angles change (longrope); None if they never do.
        scale_switch: from so many tokens on attention is scaled by their count, without a prefix (Llama 4).
    """

    kind: Kind
    geometry: Geometry
    attention: tuple[nn.Module, ...]
    stacks: tuple[nn.Module, ...]
    root: nn.Module
    context_tokens: int | None
    counts_by_mask: bool = False
    rope_switch: int | None = None
    scale_switch: int | None = None

    @property
    def stack(self) -> nn.Module:
        """The stack whose last hidden state the model's head reads."""
        return self.stacks[-1]


_ATTRIBUTE = "_prefixkit_anatomy"
#: What the names of our attention functions begin with.
_OURS = "prefixkit_"


@dataclass(frozen=True)
class _Known:
    """A model's anatomy, kept on the model itself, which it must not outlive; copies and files of the model lack it.

    Attributes:
        anatomy: as it was found.
        modules: those the model had then, by identity.
    """

    anatomy: Anatomy
    modules: tuple[int, ...]

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Become None in a copy or a file."""
        return type(None), ()


def inspect_model(model: PreTrainedModel) -> Anatomy:
    """Return a model's anatomy; asked once per model, then remembered until a module of it is replaced or removed.

    Raises:
        UnsupportedModelError: the model cannot take a prefix; the message names the model and says why.
    """
    known: _Known | None = vars(model).get(_ATTRIBUTE)
    if known is not None and (runs_ours(model) or known.modules == _modules(model)):
        _check_implementation(model)  # it can be set again at any time
        return known.anatomy
    anatomy = _inspect(model)
    setattr(model, _ATTRIBUTE, _Known(anatomy, _modules(model)))
    return anatomy


def runs_ours(model: PreTrainedModel) -> bool:
    """Whether a model's attention is ours at present: a prefix is attached, which keeps its layers, or it is probed."""
    return implementation_of(model).startswith(_OURS)


def _modules(model: nn.Module) -> tuple[int, ...]:
    return tuple(map(id, all_modules(model)))


def context_tokens(model: PreTrainedModel) -> int | None:
    """Return the number of positions the model was made for, or None if it sets no limit."""
    config = model.config.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        limit = getattr(config, key, None)
        # T5 names the length it was trained on, but its relative positions set no limit.
        if isinstance(limit, int) and limit > 0 and not hasattr(config, "relative_attention_num_buckets"):
            return limit - _unused_positions(model)
    return None


def _unused_positions(model: PreTrainedModel) -> int:
    """Return how many of its positions an encoder never uses: RoBERTa counts from the one behind padding's."""
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding: int | None = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


def text_inputs(model: PreTrainedModel, source: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return a forward's inputs for token ids `[1, s]`; an encoder-decoder's decoder reads `target` `[1, t]`."""
    inputs = {"input_ids": source.to(input_device(model))}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = target.to(input_device(model))
    return inputs


def _check_implementation(model: PreTrainedModel) -> None:
    """Refuse attention implementations a prefix cannot be prepended for; what is attached already is ours."""
    name, implementation = type(model).__name__, implementation_of(model)
    if runs_ours(model):
        return
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"{name}: attention implementation {implementation!r} is not supported; "
            'load the model with attn_implementation="sdpa" or "eager"'
        )
    if implementation == "eager" and getattr(model.config, "reorder_and_upcast_attn", False):
        raise UnsupportedModelError(
            f"{name}: reorder_and_upcast_attn bypasses the attention interface; set it to False"
        )


def _inspect(model: PreTrainedModel) -> Anatomy:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{name}: expected a transformers model, such as AutoModelForCausalLM loads")
    if not uses_interface(model):
        raise UnsupportedModelError(
            f"{name}: its attention does not go through transformers' attention interface, "
            "so no prefix can be prepended; choose another base model"
        )
    _check_implementation(model)
    if model.config.is_encoder_decoder and hasattr(model, "classification_head"):
        raise UnsupportedModelError(
            f"{name}: labels texts from its decoder's last token, which is not supported; take an encoder, such as "
            "bert-base-uncased, or the encoder-decoder that writes (AutoModelForSeq2SeqLM)"
        )
    keep_unpacked(model)
    watched = _probe(model, _SOURCE_TOKENS, _TARGET_TOKENS)
    calls = watched.calls
    kind = _kind(model, calls)
    if kind is not Kind.ENCODER_DECODER and getattr(model.config.get_text_config(), "add_cross_attention", False):
        raise UnsupportedModelError(
            f"{name}: has cross-attention (add_cross_attention) to an encoder that is no part of it, which no prefix "
            "would reach; load it with add_cross_attention=False, or choose an encoder-decoder"
        )
    stacks = _stacks(model, kind)
    if kind is Kind.DECODER and "position_ids" not in inspect.signature(stacks[0].forward).parameters:
        raise UnsupportedModelError(f"{name}: takes no position_ids, so text cannot be placed after a prefix")
    sites = _sites(calls, kind, stacks)
    _check_layers(model, kind, sites, calls)
    check_calls(name, watched, may_lack_mask=kind is not Kind.DECODER)
    if kind is not Kind.ENCODER:
        _check_cache(model, sites)
    has_values = kind is Kind.DECODER and input_device(model).type != "meta"
    return Anatomy(
        kind=kind,
        geometry=Geometry(sites),
        attention=tuple(call.module for call in calls),
        stacks=stacks,
        root=_innermost(model, stacks),
        context_tokens=context_tokens(model),
        counts_by_mask=has_values and counts_by_mask(model),
        rope_switch=rope_switch(model.config) if kind is Kind.DECODER else None,
        scale_switch=scale_switch(model.config) if kind is Kind.DECODER else None,
    )


def _kind(model: PreTrainedModel, calls: Sequence[AttentionCall]) -> Kind:
    if model.config.is_encoder_decoder:
        return Kind.ENCODER_DECODER
    causal = {getattr(call.module, "is_causal", True) for call in calls}
    if len(causal) > 1:
        raise UnsupportedModelError(f"{type(model).__name__}: some of its layers are causal and some are not")
    if causal != {False}:
        return Kind.DECODER
    if model.can_generate():
        raise UnsupportedModelError(f"{type(model).__name__}: writes text with layers that are not causal")
    return Kind.ENCODER


def _stacks(model: PreTrainedModel, kind: Kind) -> tuple[nn.Module, ...]:
    if kind is Kind.ENCODER_DECODER:
        return model.get_encoder(), model.get_decoder()
    # What an encoder calls its encoder (BERT) takes embeddings; the base model takes tokens.
    return (model.base_model if kind is Kind.ENCODER else model.get_decoder(),)


def _innermost(model: nn.Module, stacks: tuple[nn.Module, ...]) -> nn.Module:
    """Return the smallest module all stacks are parts of; a forward pass of all of them goes through it."""
    holders = [module for module in model.modules() if set(stacks) <= set(module.modules())]
    return min(holders, key=lambda module: len(list(module.modules())))


def _sites(calls: Sequence[AttentionCall], kind: Kind, stacks: tuple[nn.Module, ...]) -> tuple[Site, ...]:
    in_encoder = set() if kind is Kind.DECODER else set(stacks[0].modules())
    layers: Counter[Placement] = Counter()
    sites = []
    for call in calls:
        placement = Placement.DECODER_SELF
        if call.module in in_encoder:
            placement = Placement.ENCODER_SELF
        elif kind is Kind.ENCODER_DECODER and call.key.shape[2] != call.query.shape[2]:
            placement = Placement.CROSS
        sites.append(Site(placement, layers[placement], call.query.shape[1], call.key.shape[1], call.key.shape[3]))
        layers[placement] += 1
    return tuple(sites)


def _check_layers(model: PreTrainedModel, kind: Kind, sites: tuple[Site, ...], calls: Sequence[AttentionCall]) -> None:
    """Refuse models in which some layers mix tokens in another way than attention (state-space, linear, ...)."""
    name = type(model).__name__
    if len({call.module for call in calls}) != len(calls):
        raise UnsupportedModelError(f"{name}: runs one attention layer several times per token; not supported")
    for placement, layers in _layers(model, kind).items():
        found = sum(site.placement is placement for site in sites)
        if found != layers:
            stack = "" if kind is Kind.DECODER else f" {placement}"
            raise UnsupportedModelError(
                f"{name}: only {found} of its {layers}{stack} layers are attention layers that can take a prefix"
            )
    for call in calls:
        if call.value.shape != call.key.shape:
            raise UnsupportedModelError(f"{name}: keys and values of different shape are not supported")
        if call.key.shape[-1] != call.query.shape[-1]:
            raise UnsupportedModelError(
                f"{name}: queries and keys of different size (latent attention) are not supported"
            )


def _check_cache(model: PreTrainedModel, sites: tuple[Site, ...]) -> None:
    watched = _probe(model, 1, 1, use_cache=True)
    own = [site.placement is Placement.DECODER_SELF for site in sites]
    check_cache(
        type(model).__name__,
        watched.cache,
        [call.key for call, is_own in zip(watched.calls, own, strict=True) if is_own],
    )


def _layers(model: PreTrainedModel, kind: Kind) -> dict[Placement, int]:
    """Return how many layers each stack has by the model's configuration."""
    config = model.config.get_text_config() if kind is Kind.DECODER else model.config
    layers: int | None = getattr(config, "num_hidden_layers", None)
    if kind is not Kind.ENCODER_DECODER and layers:
        return {Placement.DECODER_SELF if kind is Kind.DECODER else Placement.ENCODER_SELF: layers}
    decoder: int | None = getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", None)
    if not layers or not decoder:
        raise UnsupportedModelError(f"{type(model).__name__}: its configuration does not say how many layers it has")
    return {Placement.ENCODER_SELF: layers, Placement.DECODER_SELF: decoder, Placement.CROSS: decoder}


def recomputable_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of text, in order, that gradient checkpointing can run again; none if the model cannot."""
    stacks = inspect_model(model).stacks if model.supports_gradient_checkpointing else ()
    return [layer for stack in stacks for layer in checkpointed_layers(stack)]


def _probe(model: PreTrainedModel, source_tokens: int, target_tokens: int, *, use_cache: bool = False) -> Watched:
    """Run a few tokens through the model, the last of several a padding token; watch its attention."""
    ids = torch.arange(source_tokens)[None]
    inputs = text_inputs(model, ids, ids[:, :target_tokens])
    is_text = ids < max(source_tokens - 1, 1)  # all but the last, so that transformers must make a mask
    inputs["attention_mask"] = is_text.long().to(input_device(model))
    if model.main_input_name == "input_features":  # Whisper hears; its encoder takes one length only
        frames = 2 * model.config.max_source_positions
        features = torch.zeros(1, model.config.num_mel_bins, frames, device=input_device(model), dtype=model.dtype)
        inputs = {"input_features": features, "decoder_input_ids": inputs["decoder_input_ids"]}
    try:
        return watch_attention(model, inputs, use_cache=use_cache)
    except KeyError as error:
        if not is_offloaded(model):
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__}: accelerate offloaded a tied weight ({error.args[0]}) that it cannot bring back; "
            "keep the embeddings, by every name they have, on a device in the device_map"
        ) from None
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedModelError(f"{type(model).__name__}: cannot run on token ids alone: {reason}") from None
