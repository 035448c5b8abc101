"""Why a base model is refused: one line each, instead of transformers' many."""

import os
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from prefixkit.compat import is_encoder, writes_text
from prefixkit.errors import ModelError, UnsupportedModelError
from prefixkit.models.sources import Source, SourceKind, packaged_hint, packaged_names

#: Names of the exceptions that mean "no connection", in whichever HTTP library is underneath.
_UNREACHABLE = frozenset(
    {
        "ConnectError",
        "ConnectionError",
        "LocalEntryNotFoundError",
        "OfflineModeIsEnabled",
        "ProxyError",
        "TimeoutError",
        "TimeoutException",
    }
)
#: Libraries for quantised weights that this project's extra installs.
_QUANTISERS = ("torchao", "bitsandbytes")
_DAMAGED = frozenset({"EOFError", "SafetensorError", "UnpicklingError"})
#: Buffers that older versions of transformers saved and that are computed today.
_OLD_BUFFERS = (".masked_bias", ".attn.bias", ".attention.bias", ".inv_freq")


def require_language_model(base: str, config: PretrainedConfig) -> None:
    """Refuse whatever does not read text.

    Args:
        base: its name, for messages.
        config: its configuration.

    Raises:
        UnsupportedModelError: it reads something else, or turns text into something else.
    """
    kind = config.model_type
    if writes_text(config) or is_encoder(config):
        return
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{base}: {kind} does not turn text into text; give one that does, such as t5")
    raise UnsupportedModelError(
        f"{base}: {kind} is no language model; give one that writes text left to right, or an encoder such as bert"
    )


def require_complete(base: str, model: PreTrainedModel, loading: dict[str, Any]) -> None:
    """Refuse a model some of whose weights were not in its files, or the other way round.

    Args:
        base: its name, for messages.
        model: as loaded.
        loading: transformers' loading info.

    Raises:
        ModelError: a weight is missing, has the wrong shape, or no place in the model; the first is named.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(key for key in set(loading["missing_keys"]) - tied if not _is_head(model, key))
    if missing:
        raise ModelError(
            f"{base}: its files hold no weight {missing[0]} ({len(missing)} missing);"
            " transformers would fill in random numbers, so it is refused: get the whole model"
        )
    mismatched = sorted(loading["mismatched_keys"])
    if mismatched:
        weight, found, expected = mismatched[0]
        raise ModelError(
            f"{base}: weight {weight} has shape {list(found)}, but config.json asks for {list(expected)};"
            " get matching config.json and weights"
        )
    extra = (key for key in loading["unexpected_keys"] if not key.endswith(_OLD_BUFFERS))
    unexpected = sorted(key for key in extra if not _is_head(model, key))
    if unexpected:
        kind = model.config.model_type
        raise ModelError(
            f"{base}: its files hold a weight {unexpected[0]} that its architecture, {kind},"
            f" has no place for ({len(unexpected)} unused); get matching config.json and weights"
        )


def _is_head(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight belongs to what stands on an encoder's layers: it differs from file to file, and is not read."""
    if not is_encoder(model.config):
        return False
    first = key.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]
    return first == "pooler" or first not in dict(model.base_model.named_children())


def explain_failure(source: Source, error: Exception, *, revision: str | None) -> ModelError:
    """Turn whatever transformers raised into a one-line error that says what to do."""
    name, chain = source.name, list(_causes(error))
    text = " ".join(" ".join(str(cause).split()) for cause in chain)
    kinds = {kind.__name__ for cause in chain for kind in type(cause).__mro__}
    if "trust_remote_code" in text:
        return UnsupportedModelError(
            f"{name}: it needs Python code from its own repository, which prefixkit does not run;"
            " give a model whose architecture is part of transformers"
        )
    if source.kind is SourceKind.HUB and (reason := _explain_hub(name, kinds, text, revision)):
        return ModelError(reason)
    if source.kind is SourceKind.GGUF:
        return _explain_gguf(name, text)
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return UnsupportedModelError(
            f"{name}: this version of transformers does not know its architecture{_model_type(text)};"
            " upgrade transformers, or give another model"
        )
    if "does not support an attention implementation" in text:
        return UnsupportedModelError(
            f"{name}: its family has no sdpa attention; try model.attention=eager"
            " (`prefixkit inspect` says whether it can take a prefix)"
        )
    return ModelError(f"{name}: {_explain_files(error, kinds, text)}")


def _explain_files(error: Exception, kinds: set[str], text: str) -> str:
    """Explain what is wrong with the files of a model, wherever they came from."""
    if kinds & _DAMAGED or "PytorchStreamReader" in text:
        return f"a weights file is truncated or damaged ({_clip(str(error))}); fetch it again"
    if "not a valid JSON" in text:
        return "its config.json is not valid JSON; fetch it again"
    if "backend tokenizer" in text:
        return "no tokenizer that can be read; expected tokenizer.json beside the weights"
    if "ImportError" in kinds:
        library = next((name for name in _QUANTISERS if name in text), None)
        if library is not None:
            return f"its weights need {library}, which is not installed or too old; pip install 'prefixkit[quantised]'"
        return f"it needs a library that is not installed ({_clip(str(error))}); install it, or give another model"
    if "MemoryError" in kinds:
        return "not enough memory to load it; take a smaller model, or model.dtype=bfloat16"
    return f"cannot be loaded ({_clip(f'{type(error).__name__}: {error}')})"


def _explain_hub(name: str, kinds: set[str], text: str, revision: str | None) -> str | None:
    """Explain what the hub, or its absence, did; None where it did nothing wrong."""
    hint = packaged_hint(name) or f"; packaged models need no hub: {packaged_names()}"
    if "RevisionNotFoundError" in kinds:
        return f"{name}: the hub has this model, but no revision {revision!r}; correct model.revision"
    if "GatedRepoError" in kinds:
        return f"{name}: its terms must be accepted first; do so on its hub page, then run `hf auth login`"
    if "RepositoryNotFoundError" in kinds:
        return f"{name}: not a folder, not packaged, and the hub has no such model (or it is private){hint}"
    if not kinds & _UNREACHABLE and "couldn't connect" not in text:
        return None
    if _is_offline():
        return (
            f"{name}: not a folder, not packaged, and not in the local hub cache, while the hub is switched"
            f" off; unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE once to fetch it{hint}"
        )
    return f"{name}: not a folder, not packaged, and the hub cannot be reached; connect once to fetch it{hint}"


def _explain_gguf(name: str, text: str) -> ModelError:
    """Explain a GGUF file that transformers cannot read."""
    if "not supported" in text and "rchitecture" in text:
        return UnsupportedModelError(
            f"{name}: transformers cannot read a GGUF of this architecture; give the original model instead"
        )
    return ModelError(f"{name}: the GGUF file is damaged, or of an unknown kind ({_clip(text)}); fetch it again")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, and those it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_offline() -> bool:
    on = {"1", "true", "yes", "on"}
    return any(os.environ.get(name, "").lower() in on for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def _model_type(text: str) -> str:
    """Return `` (mamba9)`` from transformers' "has model type `mamba9` but ...", or an empty string."""
    _, found, rest = text.partition("model type `")
    return f" ({rest.partition('`')[0]})" if found else ""


def _clip(text: str, limit: int = 160) -> str:
    """Fold white space, so that the message stays one line, and cut it."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
