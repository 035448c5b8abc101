"""A prefix to PEFT and back, exactly: `PeftModel.from_pretrained` answers as `attach` does, to the last bit.

What PEFT's format cannot say is refused. It has one length for all layers, no gate, one attention stack, text that
starts right after the prefix, float32; and PEFT's prefix is text to a sliding window, which leaves it behind. `heads`
says which classification heads it has words for; a LoRA goes to the format of its own, in `lora`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.compat import smallest_window
from prefixkit.config import Method, Placement
from prefixkit.errors import ArtefactError, ExportError
from prefixkit.export.adapter import Adapter, AdapterConfig, read_adapter, write_adapter
from prefixkit.export.heads import from_adapter, require_plain, task_of_head, to_adapter
from prefixkit.export.lora import write_lora
from prefixkit.models.fingerprint import check_base, fingerprint
from prefixkit.models.inspect import context_tokens, inspect_model
from prefixkit.prefix import BaseCard, Geometry, Prefix, PrefixStates, Site


def to_peft(prefix: Prefix, folder: str | Path, model: PreTrainedModel) -> None:
    """Write a prefix, or a LoRA alone, as a PEFT checkpoint for ``PeftModel.from_pretrained(model, folder)``.

    Training record, scores, licence and the names of labels have no place in it; keep the artefact as well. A prefix
    with a head is loaded onto transformers' class for it, such as ``AutoModelForTokenClassification``.

    Args:
        prefix: the artefact.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
        model: the base model of the prefix.

    Raises:
        ExportError: PEFT's format cannot say what this artefact is, or the folder cannot be written to.
        BaseMismatchError: the prefix belongs to another model.
    """
    if prefix.parts == (Method.LORA,):
        return write_lora(prefix, Path(folder), model)
    states, path = prefix.states, Path(folder)
    site = _require_sayable(prefix)
    if inspect_model(model).geometry != states.geometry:
        raise ExportError(
            f"the artefact of {prefix.card.base.id} has another geometry than this model; give its base model"
        )
    require_plain(model, ExportError)
    check_base(model, prefix.card.base)
    _require_no_window(model, ExportError)
    head = None if prefix.head is None else to_adapter(prefix.head, model)
    config = AdapterConfig(
        task=task_of_head(prefix.head),
        num_virtual_tokens=states.num_virtual_tokens,
        token_dim=site.kv_heads * site.head_dim,
        num_layers=len(states.geometry.sites),
        num_attention_heads=site.kv_heads,
        base_model=prefix.card.base.id,
        revision=prefix.card.base.revision,
    )
    write_adapter(path, Adapter(config, states.to_rows(), head))


def from_peft(
    folder: str | Path,
    model: PreTrainedModel,
    *,
    base_id: str | None = None,
    revision: str | None = None,
    labels: Sequence[str] | None = None,
) -> Prefix:
    """Read a PEFT prefix-tuning checkpoint, with or without ``prefix_projection``.

    PEFT does not record which weights a prefix was trained on; from here on the prefix is bound to `model`.

    Args:
        folder: what PEFT's ``save_pretrained`` wrote, or `to_peft`.
        model: the base model.
        base_id: the model's name in the artefact; left out, what the checkpoint says.
        revision: its revision; left out with `base_id`, what the checkpoint says.
        labels: names for the logits of its head, where labels were learned: PEFT's files do not hold them.

    Returns:
        The prefix, with its head if it has one, in the number format of the file.

    Raises:
        ArtefactError: the checkpoint is damaged, of another kind, does not fit the model, or PEFT's own answers with
            it would differ from ours.
        UnsupportedModelError: the model cannot take a prefix.
    """
    path = Path(folder)
    adapter = read_adapter(path)
    config, rows = adapter.config, adapter.rows
    geometry = inspect_model(model).geometry
    _require_fit(path, config, rows, geometry)
    if not geometry.moves_text:
        raise ArtefactError(
            f"{path}: only prefixes of decoder-only models can be exchanged; {type(model).__name__} is none: PEFT "
            "moves its text behind the prefix, here text keeps its positions, so that the answers would differ"
        )
    if labels is not None and adapter.head is None:
        raise ArtefactError(f"labels: {path} has no head whose logits they could name; leave them out")
    _require_no_window(model, ArtefactError)
    if _is_rounded_by_peft(rows):
        raise ArtefactError(f"{path}: {_ROUNDED}; convert it with .float() first")
    name = base_id or config.base_model or model.config.name_or_path or type(model).__name__
    if base_id is None and revision is None:
        revision = config.revision
    card = BaseCard(id=name, revision=revision, fingerprint=fingerprint(model))
    require_plain(model, ArtefactError)
    head = None if adapter.head is None else from_adapter(adapter.head, config.task, model, labels, path)
    return Prefix.from_states(PrefixStates.from_rows(geometry, rows), base=card, head=head)


_ROUNDED = "its float64 numbers are rounded to float32 when PEFT loads them, so that its answers would differ"


def _is_rounded_by_peft(rows: Tensor) -> bool:
    """PEFT copies whatever it loads into a float32 embedding; only float64 has more than that."""
    return rows.dtype == torch.float64 and not torch.equal(rows.float().double(), rows)


def _require_sayable(prefix: Prefix) -> Site:
    """Refuse what the format has no words for; return the site all layers look like."""
    states = prefix.states
    if prefix.is_infix:
        raise ExportError("PEFT's format cannot say an infix, which stands behind the input; train a prefix for it")
    if prefix.deltas:
        method = prefix.deltas[0].method
        if not any(states.lengths):
            raise ExportError(f"{method}: cannot be exported to PEFT's formats; a prefix can, and a LoRA alone")
        raise ExportError(
            f"PEFT's prefix format cannot say {method}, which was trained with this artefact; export what is left "
            f'without it: prefix.without("{method}")'
        )
    sites, lengths = states.geometry.sites, states.lengths
    other = [placement for placement in states.geometry.placements if placement is not Placement.DECODER_SELF]
    if other:
        raise ExportError(
            f"PEFT's format cannot say {other[0]} prefixes, nor layers of their own for an encoder-decoder's decoder; "
            "only decoder-only models can be exchanged"
        )
    if states.has_gate:
        raise ExportError("PEFT's format cannot say gates; train with prefix.gate=false to export to it")
    if len(set(lengths)) > 1:
        shortest = min(range(len(lengths)), key=lengths.__getitem__)
        what = "layers without a prefix" if not lengths[shortest] else "layers of differing length"
        raise ExportError(
            f"PEFT's format cannot say {what}: layer {sites[shortest].layer} has {lengths[shortest]} virtual tokens, "
            f"others {max(lengths)}"
        )
    if len({(site.kv_heads, site.head_dim) for site in sites}) > 1:
        raise ExportError("PEFT's format cannot say layers whose KV heads differ in number or size")
    if prefix.position_offset != lengths[0]:
        raise ExportError(
            f"PEFT's format cannot say position_offset {prefix.position_offset}: its text always starts right after "
            f"the prefix, at {lengths[0]}"
        )
    if _is_rounded_by_peft(states.to_rows()):
        raise ExportError(f"PEFT's format cannot say this prefix: {_ROUNDED}; convert its states with .float() first")
    return sites[0]


def _require_no_window(model: PreTrainedModel, kind: type[ArtefactError | ExportError]) -> None:
    """Refuse models whose window is shorter than their context: in it, PEFT's prefix scrolls out of sight."""
    window, context = smallest_window(model.config), context_tokens(model)
    if window is not None and (context is None or window < context):
        raise kind(
            f"{type(model).__name__} has a sliding window of {window} tokens: PEFT's prefix disappears behind it while "
            "prefixkit's stays in sight, so their answers would differ; PEFT's format is no choice for this model"
        )


def _require_fit(path: Path, config: AdapterConfig, rows: Tensor, geometry: Geometry) -> None:
    """Refuse numbers that do not belong to a model of this geometry."""
    sites = geometry.sites
    first = sites[0]
    name = config.base_model or "its base model"
    if any((site.kv_heads, site.head_dim) != (first.kv_heads, first.head_dim) for site in sites):
        raise ArtefactError(
            f"{path}: this model's layers differ in KV heads, which PEFT's format cannot say; load {name}"
        )
    token_dim = first.kv_heads * first.head_dim
    for key, said, expected in (
        ("num_layers", config.num_layers, len(sites)),
        ("token_dim", config.token_dim, token_dim),
        ("num_attention_heads", config.num_attention_heads, first.kv_heads),
    ):
        if said is not None and said != expected:
            raise ArtefactError(f"{path}: {key}: the checkpoint has {said}, this model {expected}; load {name}")
    if rows.shape[1] != geometry.numbers_per_token:
        raise ArtefactError(
            f"{path}: the checkpoint has {rows.shape[1]} numbers per virtual token, this model takes "
            f"{geometry.numbers_per_token} ({len(sites)} layers, key and value of {token_dim}); load {name}"
        )
