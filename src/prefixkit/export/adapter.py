"""PEFT's checkpoint of a prefix: what its two files hold, read with checks and written whole.

    adapter_model.safetensors   prompt_embeddings   [p, l * 2 * g * d]     one row per virtual token:
                                                    layer 0's key, layer 0's value, layer 1's key, ... each head by head
                                base_model.score.weight     [c, e]         where labels were learned, and perhaps .bias
                                                                           [c]; some models call it classifier
    adapter_config.json         what the numbers belong to

Read from peft 0.21.2, ``tuners/prefix_tuning/model.py`` and ``PeftModel.get_prompt``. An MLP (``prefix_projection``) is
folded away when PEFT saves, as it is here, so the numbers are the prefix in either case.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from prefixkit.errors import ArtefactError, ExportError
from prefixkit.files import atomic_path, read_json, write_json

TENSORS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
#: What a PEFT checkpoint consists of.
PEFT_FILES = (TENSORS_NAME, CONFIG_NAME)
_PICKLE_NAME = "adapter_model.bin"
_KEY = "prompt_embeddings"
#: What transformers calls the linear layer that says labels, which PEFT saves beside the prefix.
HEAD_NAMES = ("score", "classifier")
_HEAD = re.compile(rf"base_model\.({'|'.join(HEAD_NAMES)})\.(weight|bias)")
_CONVERT = (
    "import torch, safetensors.torch as s; "
    f"s.save_file(torch.load('{_PICKLE_NAME}', weights_only=True), '{TENSORS_NAME}')"
)
#: Keys whose value does not change what the saved numbers mean.
_HARMLESS = frozenset({"auto_mapping", "encoder_hidden_size", "inference_mode", "init_weights", "peft_version",
                       "prefix_projection"})  # fmt: skip
_FORMATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SIZES = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")
_READ = frozenset({"peft_type", "task_type", "num_transformer_submodules", "modules_to_save", "revision",
                   "base_model_name_or_path", *_SIZES})  # fmt: skip


class TaskType(StrEnum):
    """PEFT's tasks."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

    @property
    def has_head(self) -> bool:
        """Whether a head for labels is trained beside the prefix."""
        return self in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS)


#: Those whose prefixes can be exchanged: of decoder-only models, with a head for labels or without.
EXCHANGED = (TaskType.CAUSAL_LM, TaskType.FEATURE_EXTRACTION, TaskType.SEQ_CLS, TaskType.TOKEN_CLS)
#: Why the others cannot.
_WHY_NOT = {
    "SEQ_2_SEQ_LM": "in an encoder-decoder PEFT lets layers share their halves and counts positions to the prefix, "
    "which is not what its paper or a prefix here says",
    "QUESTION_ANS": "its head says where an answer stands, which is no label",
}


@dataclass(frozen=True)
class AdapterHead:
    """The linear layer that says labels.

    Attributes:
        name: its name in the model, one of `HEAD_NAMES`.
        weight: `[c, e]`.
        bias: `[c]`, if it has one.
    """

    name: str
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` says about a prefix.

    Attributes:
        task: what was trained.
        num_virtual_tokens: `p`.
        token_dim: `g * d`: numbers of one key.
        num_layers: `l`.
        num_attention_heads: `g`, PEFT's name for the KV heads.
        base_model: `base_model_name_or_path`.
        revision: of the base model.
    """

    task: TaskType
    num_virtual_tokens: int
    token_dim: int | None
    num_layers: int | None
    num_attention_heads: int | None
    base_model: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Adapter:
    """A PEFT checkpoint of a prefix.

    Attributes:
        config: what the numbers belong to.
        rows: `[p, l * 2 * g * d]`.
        head: trained beside the prefix, where labels were learned.
    """

    config: AdapterConfig
    rows: Tensor
    head: AdapterHead | None = None


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write a PEFT checkpoint of a prefix.

    Args:
        folder: where to.
        adapter: what to write.

    Raises:
        ExportError: the folder cannot be written to; files already there are untouched.
    """
    config, head = adapter.config, adapter.head
    values = {
        "peft_type": "PREFIX_TUNING",
        "task_type": config.task.value,
        "base_model_name_or_path": config.base_model,
        "revision": config.revision,
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "prefix_projection": False,  # the MLP is folded away; PEFT, too, would not look for one
        "encoder_hidden_size": config.token_dim,
        "modules_to_save": None if head is None else list(HEAD_NAMES),
    } | {size: getattr(config, size) for size in _SIZES}
    tensors = {_KEY: adapter.rows}
    if head is not None:
        parts = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
        tensors |= {f"base_model.{head.name}.{part}": tensor for part, tensor in parts.items()}
    write_checkpoint(folder, values, tensors)


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the two files of a PEFT checkpoint, of whatever method; they are written aside, then renamed into place.

    Args:
        folder: where to.
        config: the content of `adapter_config.json`.
        tensors: that of `adapter_model.safetensors`.

    Raises:
        ExportError: the folder cannot be written to; files already there are untouched.
    """
    content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, {"format": "pt"})
    try:
        with atomic_path(folder / CONFIG_NAME) as config_path, atomic_path(folder / TENSORS_NAME) as path:
            path.write_bytes(content)
            write_json(config_path, dict(config))
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written to: {error.strerror or error}") from None


def read_adapter(folder: Path) -> Adapter:
    """Read a PEFT prefix-tuning checkpoint of a decoder-only model.

    Returns:
        What it says, and the numbers as they are in the file: two dimensions, all finite.

    Raises:
        ArtefactError: it is incomplete, damaged, of another kind, or says something a prefix cannot hold.
    """
    config = _read_config(folder)
    path = folder / TENSORS_NAME
    if not path.is_file():
        if (folder / _PICKLE_NAME).is_file():
            raise ArtefactError(
                f"{folder / _PICKLE_NAME}: a pickle, which can run code when it is read; it was not; if you trust it, "
                f'convert it there: python -c "{_CONVERT}"'
            )
        raise ArtefactError(f"{folder}: has {CONFIG_NAME} but no {TENSORS_NAME}; copy the whole folder again")
    try:
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        raise ArtefactError(f"{path}: not a readable safetensors file: {error}; copy it again") from None
    rows = tensors.pop(_KEY, None)
    if rows is None:
        raise ArtefactError(f"{path}: tensor {_KEY} is missing; is this a prefix-tuning checkpoint?")
    head = _take_head(tensors, path) if config.task.has_head else None
    if tensors:
        raise ArtefactError(
            f"{path}: also holds {min(tensors)}, a weight of the base model; a prefix cannot hold it, "
            "so the checkpoint cannot be imported exactly"
        )
    if rows.dim() != 2 or len(rows) != config.num_virtual_tokens:
        raise ArtefactError(
            f"{path}: expected one row per virtual token, {config.num_virtual_tokens} as {CONFIG_NAME} says, "
            f"got shape {list(rows.shape)}"
        )
    parts = [] if head is None else [head.weight, *([] if head.bias is None else [head.bias])]
    for key, tensor in ((_KEY, rows), *(("its head", part) for part in parts)):
        if tensor.dtype not in _FORMATS or not torch.isfinite(tensor).all():
            raise ArtefactError(
                f"{path}: {key} holds NaN, infinite numbers, or none at all; the run that wrote it failed"
            )
    if len({part.dtype for part in parts}) > 1:
        raise ArtefactError(f"{path}: weight and bias of its head have different number formats; convert one of them")
    return Adapter(config, rows, head)


def _take_head(tensors: dict[str, Tensor], path: Path) -> AdapterHead:
    """Take a head's tensors out of those of a file."""
    found = {key: match for key in sorted(tensors) if (match := _HEAD.fullmatch(key))}
    names = {match[1] for match in found.values()}
    parts = {match[2]: tensors.pop(key) for key, match in found.items()}
    if len(names) != 1 or "weight" not in parts:
        raise ArtefactError(
            f"{path}: expected the weights of one linear layer, {' or '.join(HEAD_NAMES)}, as its head, got "
            f"{', '.join(found) or 'none'}; heads of several layers cannot be imported"
        )
    weight, bias = parts["weight"], parts.get("bias")
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise ArtefactError(f"{path}: its head is no linear layer: shape {list(weight.shape)}; it cannot be imported")
    return AdapterHead(names.pop(), weight, bias)


def _read_config(folder: Path) -> AdapterConfig:
    values = _read_object(folder)
    path = folder / CONFIG_NAME
    kind = values.get("peft_type")
    if kind != "PREFIX_TUNING":
        todo = "load it with peft; LoRA and its kin work beside an attached prefix" if kind else "is it PEFT's?"
        raise ArtefactError(f"{path}: peft_type: expected PREFIX_TUNING, got {kind}; {todo}")
    said = values.get("task_type")
    if said not in EXCHANGED:
        why = _WHY_NOT.get(str(said), "is it PEFT's?")
        raise ArtefactError(f"{path}: task_type: expected {', '.join(EXCHANGED)}, got {said}; {why}")
    task = TaskType(said)
    stacks = values.get("num_transformer_submodules")
    if stacks is not None and (stacks != 1 or isinstance(stacks, bool)):
        raise ArtefactError(
            f"{path}: num_transformer_submodules: expected 1, got {stacks!r}; "
            "only prefixes of decoder-only models can be exchanged"
        )
    saved = values.get("modules_to_save") or []
    if not isinstance(saved, list):
        raise ArtefactError(f"{path}: modules_to_save: expected a list of names, got {saved!r}")
    others = [name for name in saved if not (task.has_head and name in HEAD_NAMES)]
    if others:
        raise ArtefactError(f"{path}: modules_to_save: {others} were trained as well; a prefix cannot hold them")
    strange = [key for key in sorted(values.keys() - _READ - _HARMLESS) if values[key] not in (None, False, [], {})]
    if strange:
        raise ArtefactError(
            f"{path}: {strange[0]}: unknown, written by a PEFT newer than 0.21; it may change what the numbers mean"
        )
    for key in _SIZES:
        size = values.get(key)
        is_size = isinstance(size, int) and not isinstance(size, bool) and size > 0
        if not is_size and (size is not None or key == "num_virtual_tokens"):
            raise ArtefactError(f"{path}: {key}: expected a number of at least 1, got {size!r}")
    base, revision = (values.get(key) for key in ("base_model_name_or_path", "revision"))
    for key, text in (("base_model_name_or_path", base), ("revision", revision)):
        if text is not None and not isinstance(text, str):
            raise ArtefactError(f"{path}: {key}: expected text, got {text!r}")
    sizes: dict[str, Any] = {key: values.get(key) for key in _SIZES}
    return AdapterConfig(task, **sizes, base_model=base or None, revision=revision or None)


def _read_object(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ArtefactError(f"{folder}: {_missing(folder)}")
    try:
        values = read_json(path)
    except (ValueError, OSError) as error:
        raise ArtefactError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ArtefactError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _missing(folder: Path) -> str:
    """Say why there is no configuration, and where it may be."""
    if not folder.is_dir():
        return "no such folder; a checkpoint on the hub must be downloaded first (hf download NAME --local-dir FOLDER)"
    named = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
    if named:
        return f"has no {CONFIG_NAME}, but its folder {named[0]} has one; give that"
    if (folder / "prefix.json").is_file():
        return f"has no {CONFIG_NAME}; it is a prefixkit artefact already"
    return f"has no {CONFIG_NAME}; expected a folder that PEFT's save_pretrained wrote"
