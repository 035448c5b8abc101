"""Reading back what `save_pretrained` wrote, ours or PEFT's."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.errors import ArtefactError
from prefixkit.export import from_peft
from prefixkit.export.adapter import CONFIG_NAME, read_adapter
from prefixkit.models.fingerprint import check_base
from prefixkit.prefix import PREFIX_FILES, Prefix, PrefixStates


def load_prefix(folder: Path, model: PreTrainedModel) -> Prefix:
    """Read a prefix from an artefact or a PEFT checkpoint; of a folder that is both, check that they agree.

    Raises:
        ArtefactError: the folder holds no prefix, a damaged one, or two that differ.
        BaseMismatchError: the prefix belongs to another base model.
    """
    is_artefact, is_checkpoint = (
        any((folder / n).is_file() for n in names) for names in (PREFIX_FILES, (CONFIG_NAME,))
    )
    if is_artefact:
        prefix = Prefix.load(folder)
        check_base(model, prefix.card.base)
        if is_checkpoint and not torch.equal(prefix.states.to_rows(), read_adapter(folder)[1]):
            raise ArtefactError(
                f"{folder}: prefix.safetensors and adapter_model.safetensors differ; remove the files of the older one"
            )
        return prefix
    if not is_checkpoint and (folder / "model.safetensors").is_file():
        raise ArtefactError(
            f"{folder}: a checkpoint of transformers' Trainer, to resume from; save a prefix with "
            "model.save_pretrained(folder)"
        )
    return from_peft(folder, model)


def _is_same(states: PrefixStates, rows: Tensor) -> bool:
    """Whether states are what a PEFT checkpoint holds."""
    if len(set(states.lengths)) > 1 or states.has_gate:
        return False
    own = states.to_rows()
    return own.dtype == rows.dtype and torch.equal(own, rows)
