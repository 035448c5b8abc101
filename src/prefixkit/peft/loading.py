"""What `save_pretrained` writes, and reading it back, ours or PEFT's."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.errors import ArtefactError, ConfigError, ExportError, UnsupportedModelError
from prefixkit.export import from_peft, to_peft
from prefixkit.export.adapter import CONFIG_NAME, PEFT_FILES, TaskType, read_adapter
from prefixkit.logs import get_logger
from prefixkit.models.fingerprint import check_base, fingerprint
from prefixkit.models.inspect import inspect_model
from prefixkit.models.weights import input_device
from prefixkit.peft.config import NOT_OFFERED, PROJECTION_DEPTH, TRAINERS, has_head, task_of
from prefixkit.prefix import PREFIX_FILES, BaseCard, Prefix, PrefixEncoder, PrefixStates, reproduce

log = get_logger(__name__)

#: Among the parameters in a Trainer's checkpoint, the position of the first text token.
POSITION = "position_offset"
#: Likewise, behind an MLP that does not serve all sites alike: virtual tokens per site.
LENGTHS = "lengths"
#: Likewise, the bytes of the base model's fingerprint.
FINGERPRINT = "base_fingerprint"


def save_prefix(prefix: Prefix, folder: str | Path, model: PreTrainedModel) -> None:
    """Write the artefact, and beside it PEFT's files where PEFT's format can say what the prefix is.

    Raises:
        ArtefactError: the folder cannot be written to.
    """
    prefix = prefix.save(folder)
    try:
        to_peft(prefix, folder, model)
    except ExportError as error:
        for name in PEFT_FILES:  # of a prefix that was saved here before
            (Path(folder) / name).unlink(missing_ok=True)
        log.warning("%s: saved as a prefixkit artefact only: %s", folder, error)


def load_prefix(folder: Path, model: PreTrainedModel) -> Prefix:
    """Read a prefix from an artefact, a PEFT checkpoint, or what `Trainer.save_model` left.

    Of a folder that is more than one of them, as `save_pretrained` writes it, all must agree.

    Raises:
        UnsupportedModelError: the model is an encoder.
        ArtefactError: the folder holds no prefix, a damaged one, one with a classification head, or two that differ.
        BaseMismatchError: the prefix belongs to another base model.
    """
    require_task(model)
    is_checkpoint, is_trainers = (folder / CONFIG_NAME).is_file(), (folder / TRAINERS).is_file()
    if any((folder / name).is_file() for name in PREFIX_FILES):
        prefix = Prefix.load(folder)
        if prefix.head is not None:
            raise has_head(folder)
        if prefix.is_infix:
            raise ArtefactError(f"{folder}: is an infix, no prefix; attach it with prefixkit.attach")
        if prefix.deltas:
            raise ArtefactError(
                f"{folder}: holds {prefix.deltas[0].method} beside its prefix, which is no PeftModel; load it with "
                "prefixkit.peft.HybridModel.from_pretrained, or attach it"
            )
        check_base(model, prefix.card.base)
        if is_checkpoint and not _is_same(prefix.states, read_adapter(folder).rows):
            raise _differ(folder, "adapter_model.safetensors")
        if is_trainers:
            other = _from_trainer(folder / TRAINERS, model)
            if not prefix.states.equals(other.states) or prefix.position_offset != other.position_offset:
                raise _differ(folder, TRAINERS)
        return prefix
    if not is_checkpoint and is_trainers:
        return _from_trainer(folder / TRAINERS, model)
    prefix = from_peft(folder, model)
    if prefix.head is not None:
        raise has_head(folder)
    return prefix


def require_task(model: PreTrainedModel) -> TaskType:
    """Return the task a model is for; refuse models that PEFT's names are not offered for.

    Raises:
        UnsupportedModelError: the model is an encoder.
    """
    task = task_of(inspect_model(model).geometry)
    if task is None:
        raise UnsupportedModelError(f"{type(model).__name__}: {NOT_OFFERED}")
    return task


def base_card(model: PreTrainedModel, name: str | None = None, revision: str | None = None) -> BaseCard:
    """Describe a base model, with nothing attached that changes its weights; left out, the name is its own."""
    known = name or model.config.name_or_path or type(model).__name__
    return BaseCard(id=known, revision=revision, fingerprint=fingerprint(model))


def encoder_of(model: PreTrainedModel, prefix: Prefix) -> PrefixEncoder:
    """Return an encoder that gives a trained prefix's keys and values, to train on, on the model's device."""
    states = prefix.states
    dtype = torch.promote_types(states.sites[0].key.dtype, torch.float32)
    encoder = PrefixEncoder(states.geometry, states.lengths, gated=states.has_gate, dtype=dtype).to(input_device(model))
    reproduce(encoder, states)
    return encoder


def _differ(folder: Path, other: str) -> ArtefactError:
    return ArtefactError(f"{folder}: prefix.safetensors and {other} differ; remove the files of the older one")


def _from_trainer(path: Path, model: PreTrainedModel) -> Prefix:
    """Rebuild the encoder from its parameters, which is what a Trainer saves of a `PeftModel`."""
    geometry = inspect_model(model).geometry
    try:
        state = load(path.read_bytes())
        offset = int(state.pop(POSITION)) if POSITION in state else None
        given: Tensor | None = state.pop(LENGTHS, None)
        base: Tensor | None = state.pop(FINGERPRINT, None)
        table, gated = state.get("table"), any(name.startswith("gates.") for name in state)
        if table is None:
            lengths = tuple(state[f"states.{index}"].shape[2] for index in range(len(geometry.sites)))
            encoder = PrefixEncoder(geometry, lengths, gated=gated)
        else:
            tokens, width = table.shape
            lengths = geometry.lengths(tokens) if given is None else tuple(given.tolist())
            encoder = PrefixEncoder(geometry, lengths, depth=PROJECTION_DEPTH, width=width, gated=gated)
        encoder.load_state_dict(state)
        if not all(parameter.isfinite().all() for parameter in encoder.parameters()):
            raise ValueError
    except (SafetensorError, ConfigError, KeyError, RuntimeError, IndexError, ValueError):
        raise ArtefactError(
            f"{path}: holds no prefix for this model; expected what Trainer.save_model or a checkpoint left of one"
        ) from None
    check_fingerprint(model, base)
    return Prefix.from_states(encoder.materialise(), base=base_card(model), position_offset=offset)


def as_fingerprint(model: PreTrainedModel) -> Tensor:
    """Return a base model's fingerprint as a Trainer's checkpoint keeps it."""
    return torch.tensor(list(bytes.fromhex(fingerprint(model))), dtype=torch.uint8)


def check_fingerprint(model: PreTrainedModel, saved: Tensor | None) -> None:
    """Refuse a checkpoint of another base model's; older ones do not say whose they are.

    Raises:
        BaseMismatchError: it is.
    """
    if saved is not None:
        check_base(model, BaseCard(id="another base model", fingerprint=bytes(saved.tolist()).hex()))


def _is_same(states: PrefixStates, rows: Tensor) -> bool:
    """Whether states are what a PEFT checkpoint holds."""
    if len(set(states.lengths)) > 1 or states.has_gate:
        return False
    own = states.to_rows()
    return own.dtype == rows.dtype and torch.equal(own, rows)
