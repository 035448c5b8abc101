"""PEFT's checkpoint of a prefix: what its two files hold, read with checks and written whole.

    adapter_model.safetensors   prompt_embeddings   [p, l * 2 * g * d]     one row per virtual token:
                                                    layer 0's key, layer 0's value, layer 1's key, ... each head by head
    adapter_config.json         what the numbers belong to

Read from peft 0.21.2, ``tuners/prefix_tuning/model.py`` and ``PeftModel.get_prompt``. An MLP (``prefix_projection``) is
folded away when PEFT saves, as it is here, so the numbers are the prefix in either case.
"""

from dataclasses import dataclass
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
_CONVERT = (
    "import torch, safetensors.torch as s; "
    f"s.save_file(torch.load('{_PICKLE_NAME}', weights_only=True), '{TENSORS_NAME}')"
)
#: Keys whose value does not change what the saved numbers mean.
_HARMLESS = frozenset({"auto_mapping", "encoder_hidden_size", "inference_mode", "init_weights", "peft_version",
                       "prefix_projection"})  # fmt: skip
_SIZES = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")
_READ = frozenset({"peft_type", "task_type", "num_transformer_submodules", "modules_to_save", "revision",
                   "base_model_name_or_path", *_SIZES})  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` says about a prefix.

    Attributes:
        num_virtual_tokens: `p`.
        token_dim: `g * d`: numbers of one key.
        num_layers: `l`.
        num_attention_heads: `g`, PEFT's name for the KV heads.
        base_model: `base_model_name_or_path`.
        revision: of the base model.
    """

    num_virtual_tokens: int
    token_dim: int | None
    num_layers: int | None
    num_attention_heads: int | None
    base_model: str | None = None
    revision: str | None = None


def write_adapter(folder: Path, config: AdapterConfig, rows: Tensor) -> None:
    """Write a PEFT checkpoint; both files are written aside, then renamed into place.

    Args:
        folder: where to.
        config: what the numbers belong to.
        rows: `[p, l * 2 * g * d]`.

    Raises:
        ExportError: the folder cannot be written to; files already there are untouched.
    """
    values = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model,
        "revision": config.revision,
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "prefix_projection": False,  # the MLP is folded away; PEFT, too, would not look for one
        "encoder_hidden_size": config.token_dim,
    } | {size: getattr(config, size) for size in _SIZES}
    content = save({_KEY: rows.detach().cpu().contiguous()}, metadata={"format": "pt"})
    try:
        with atomic_path(folder / CONFIG_NAME) as config_path, atomic_path(folder / TENSORS_NAME) as path:
            path.write_bytes(content)
            write_json(config_path, values)
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written to: {error.strerror or error}") from None


def read_adapter(folder: Path) -> tuple[AdapterConfig, Tensor]:
    """Read a PEFT prefix-tuning checkpoint of a decoder-only language model.

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
    if not rows.is_floating_point() or not torch.isfinite(rows).all():
        raise ArtefactError(f"{path}: {_KEY} holds NaN, infinite numbers, or none at all; the run that wrote it failed")
    return config, rows


def _read_config(folder: Path) -> AdapterConfig:
    values = _read_object(folder)
    path = folder / CONFIG_NAME
    kind = values.get("peft_type")
    if kind != "PREFIX_TUNING":
        todo = "load it with peft; LoRA and its kin work beside an attached prefix" if kind else "is it PEFT's?"
        raise ArtefactError(f"{path}: peft_type: expected PREFIX_TUNING, got {kind}; {todo}")
    task = values.get("task_type")
    if task != "CAUSAL_LM":
        why = (
            "in an encoder-decoder PEFT lets layers share their halves, which is not what its paper or a prefix says"
            if task == "SEQ_2_SEQ_LM"
            else "only decoder-only language models can be interchanged"
        )
        raise ArtefactError(f"{path}: task_type: expected CAUSAL_LM, got {task}; {why}")
    if values.get("num_transformer_submodules") not in (1, None):
        raise ArtefactError(
            f"{path}: num_transformer_submodules: expected 1, got {values['num_transformer_submodules']}; "
            "only decoder-only language models can be interchanged"
        )
    if values.get("modules_to_save"):
        raise ArtefactError(
            f"{path}: modules_to_save: {values['modules_to_save']} were trained as well; a prefix cannot hold them"
        )
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
    return AdapterConfig(**sizes, base_model=base or None, revision=revision or None)


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
