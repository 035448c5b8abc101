"""Reading back what `save_pretrained` wrote, ours or PEFT's."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.errors import ArtefactError
from prefixkit.export import from_peft
from prefixkit.export.adapter import CONFIG_NAME, read_adapter
from prefixkit.models.fingerprint import check_base, fingerprint
from prefixkit.models.inspect import inspect_model
from prefixkit.peft.config import PROJECTION_DEPTH
from prefixkit.prefix import PREFIX_FILES, BaseCard, Prefix, PrefixEncoder, PrefixStates

#: What transformers' Trainer calls the parameters of a model it does not know.
_TRAINERS = "model.safetensors"


def load_prefix(folder: Path, model: PreTrainedModel) -> Prefix:
    """Read a prefix from an artefact, a PEFT checkpoint, or what `Trainer.save_model` left.

    Of a folder that is an artefact and a PEFT checkpoint, as `save_pretrained` writes it, both must agree.

    Raises:
        ArtefactError: the folder holds no prefix, a damaged one, or two that differ.
        BaseMismatchError: the prefix belongs to another base model.
    """
    is_checkpoint = (folder / CONFIG_NAME).is_file()
    if any((folder / name).is_file() for name in PREFIX_FILES):
        prefix = Prefix.load(folder)
        check_base(model, prefix.card.base)
        if is_checkpoint and not _is_same(prefix.states, read_adapter(folder)[1]):
            raise ArtefactError(
                f"{folder}: prefix.safetensors and adapter_model.safetensors differ; remove the files of the older one"
            )
        return prefix
    if not is_checkpoint and (folder / _TRAINERS).is_file():
        return _from_trainer(folder / _TRAINERS, model)
    return from_peft(folder, model)


def _from_trainer(path: Path, model: PreTrainedModel) -> Prefix:
    """Rebuild the encoder from its parameters, which is what a Trainer saves of a `PeftModel`."""
    geometry = inspect_model(model).geometry
    try:
        state = load(path.read_bytes())
        table = state.get("table")
        tokens, width = (state["states.0"].shape[2], 1) if table is None else table.shape
        encoder = PrefixEncoder(
            geometry, geometry.lengths(tokens), depth=0 if table is None else PROJECTION_DEPTH, width=width
        )
        encoder.load_state_dict(state)
        if not all(parameter.isfinite().all() for parameter in encoder.parameters()):
            raise ValueError
    except (SafetensorError, KeyError, RuntimeError, IndexError, ValueError):
        raise ArtefactError(
            f"{path}: holds no prefix for this model; expected what Trainer.save_model or a checkpoint left of one"
        ) from None
    name = model.config.name_or_path or type(model).__name__
    return Prefix.from_states(encoder.materialise(), base=BaseCard(id=name, fingerprint=fingerprint(model)))


def _is_same(states: PrefixStates, rows: Tensor) -> bool:
    """Whether states are what a PEFT checkpoint holds."""
    if len(set(states.lengths)) > 1 or states.has_gate:
        return False
    own = states.to_rows()
    return own.dtype == rows.dtype and torch.equal(own, rows)
