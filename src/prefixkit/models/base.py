"""Loading a frozen base model: complete, in evaluation mode, with a tokenizer that can pad, or not at all.

transformers fills weights a file does not hold with random numbers and says so in a warning. Here that is an
error: a prefix trained on such a model would belong to nothing.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prefixkit.compat import is_encoder
from prefixkit.config import Attention, Dtype, Format
from prefixkit.errors import ConfigError, ModelError, PrefixkitError, UnsupportedModelError
from prefixkit.logs import get_logger
from prefixkit.models.hardware import choose_device, choose_dtype
from prefixkit.models.inspect import context_tokens
from prefixkit.models.licences import find_licence
from prefixkit.models.locations import Location, locate, pinned
from prefixkit.models.packaged import PACKAGED_MODELS
from prefixkit.models.quantised import check_dtype, keep_unpacked
from prefixkit.models.quiet import quiet_transformers
from prefixkit.models.refusals import explain_failure, require_complete, require_language_model
from prefixkit.models.sources import Source, SourceKind, resolve_source

log = get_logger(__name__)


@dataclass(frozen=True)
class Base:
    """A frozen base model and its tokenizer."""

    id: str
    """The name it was asked for by: packaged name, folder, file or hub id."""
    model: PreTrainedModel
    """In evaluation mode; no parameter wants a gradient."""
    tokenizer: PreTrainedTokenizerBase
    """Always has a padding token."""
    dtype: torch.dtype
    """Number format of the weights."""
    licence: str
    """As its package or model card says; ``unknown`` where neither does."""
    revision: str | None = None
    """Commit of a hub model, version of a packaged one, None for folders and files."""
    is_pad_eos: bool = False
    """True where the end-of-text token pads, for want of another; the embeddings are not resized."""

    @property
    def context_tokens(self) -> int | None:
        """Longest text the model has positions for, virtual tokens included; None where it names no limit."""
        return context_tokens(self.model)

    @property
    def reads_both_ways(self) -> bool:
        """Whether the model is an encoder, such as BERT: it has hidden states, and writes no text."""
        return is_encoder(self.model.config)

    def require_writer(self) -> None:
        """Raise if the model writes no text.

        Raises:
            UnsupportedModelError: it is an encoder.
        """
        if self.reads_both_ways:
            raise UnsupportedModelError(
                f"{self.id}: {self.model.config.model_type} reads both ways and writes no text; give a model that "
                "writes, or have it learn labels (data.format classes or tags)"
            )

    def check_format(self, kind: Format) -> None:
        """Raise if the model cannot learn from data of this format.

        Raises:
            UnsupportedModelError: it is an encoder and is to write, or has an encoder and a decoder and is to label.
        """
        if not kind.is_classified:
            self.require_writer()
        elif self.model.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"{self.id}: data.format {kind} needs an encoder, such as bert-base-uncased, or a decoder-only model; "
                f"{self.model.config.model_type} has both"
            )

    @property
    def start_token_id(self) -> int | None:
        """The token an encoder-decoder's decoder starts from; None for a decoder-only model, which continues its text.

        Raises:
            ModelError: it is an encoder-decoder that names none.
        """
        if not self.model.config.is_encoder_decoder:
            return None
        for source in (self.model.generation_config, self.model.config):
            start: int | None = getattr(source, "decoder_start_token_id", None)
            if start is not None:
                return start
        raise ModelError(f"{self.id}: names no decoder_start_token_id; set it in its config.json")


def load_base_model(
    base: str,
    *,
    revision: str | None = None,
    dtype: Dtype | str = Dtype.AUTO,
    attention: Attention | str = Attention.SDPA,
    on_cpu: bool = False,
) -> Base:
    """Load a frozen language model and its tokenizer.

    It may be decoder-only, an encoder-decoder that turns text into text, or an encoder, of which only the layers are
    loaded: whatever head or pooler its files hold, or lack, is left out.

    Args:
        base: a packaged model (``smollm2-135m``), a folder, a .gguf file, or a hub id, tried in this order.
        revision: branch, tag or commit of a hub model.
        dtype: number format of the weights; ``auto`` takes bfloat16 where the hardware computes it natively.
        attention: transformers' attention implementation; ``fastest``, which is for training, loads sdpa.
        on_cpu: leave it in the machine's memory, for `shard` to put its parts where they run.

    Raises:
        ModelError: the model cannot be found, read or verified; the message is one line and says what to do.
        UnsupportedModelError: it reads no text, or is of an unknown architecture.
        ConfigError: dtype or attention is none of those prefixkit knows.
    """
    source = resolve_source(base)
    chosen = choose_dtype(dtype)
    attention = _require_attention(attention)
    location = locate(source, revision)
    if source.kind is SourceKind.HUB:
        log.info("asking the model hub for %s", base)
    model, tokenizer, loading, commit = _load(source, location, chosen, attention, revision)
    require_complete(base, model, loading)
    check_dtype(base, model, chosen)
    if not on_cpu:
        model.to(choose_device())  # type: ignore[arg-type]
    is_pad_eos = _ensure_padding(base, tokenizer)
    _freeze(model, tokenizer)
    found, licence = _provenance(source, commit)
    return Base(base, model, tokenizer, chosen, licence, found, is_pad_eos)


def _load(
    source: Source, location: Location, dtype: torch.dtype, attention: Attention, revision: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any], str | None]:
    """Call transformers, quietly; whatever it raises becomes one line. Returns the commit too, of a hub model."""
    watching, commit = source.kind is SourceKind.HUB and sys.stderr.isatty(), None
    try:
        with quiet_transformers(bars=watching):
            if source.kind is SourceKind.HUB:
                location, commit = pinned(location)
            config = AutoConfig.from_pretrained(location.where, **location.options)
            require_language_model(source.name, config)
            # Weights of other shapes are let through here, for `require_complete` to name the first.
            loaded: Any = _automodel(config).from_pretrained(
                location.where,
                **location.options,
                dtype=dtype,
                attn_implementation=attention.loaded,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(location.where, **location.options)
    except PrefixkitError:
        raise
    except Exception as error:
        raise explain_failure(source, error, revision=revision) from None
    model, loading = loaded
    if is_encoder(config) and hasattr(model, "pooler"):
        model.pooler = None
    return model, tokenizer, loading, commit


def _automodel(config: PretrainedConfig) -> Any:
    """Return transformers' class for this kind of model."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    return AutoModel if is_encoder(config) else AutoModelForCausalLM


def _require_attention(attention: Attention | str) -> Attention:
    names = [item.value for item in Attention]
    if attention not in names:
        raise ConfigError(f"model.attention: expected {', '.join(names[:-1])} or {names[-1]}, got {str(attention)!r}")
    return Attention(attention)


def _ensure_padding(base: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Let the end-of-text token pad where there is no padding token; tell whether that was needed."""
    if tokenizer.pad_token is not None:
        return False
    if tokenizer.eos_token is None:
        raise ModelError(f"{base}: its tokenizer has neither a padding nor an end-of-text token; set pad_token in it")
    tokenizer.pad_token = tokenizer.eos_token
    return True


def _freeze(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Evaluation mode, no gradients, and a padding id so that generation need not guess one."""
    model.eval()
    keep_unpacked(model)
    model.requires_grad_(False)
    settings = getattr(model, "generation_config", None)  # an encoder generates nothing
    if settings is not None and settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id


def _provenance(source: Source, commit: str | None) -> tuple[str | None, str]:
    """Return the revision that was loaded, and its licence."""
    if source.kind is SourceKind.PACKAGED:
        file = PACKAGED_MODELS[source.name].files[0]
        return file.version, file.licence
    if source.kind is SourceKind.HUB:
        return commit, find_licence(hub_id=source.name, revision=commit)
    folder = source.path if source.kind is SourceKind.FOLDER else Path(source.path or ".").parent
    return None, find_licence(folder=folder)
