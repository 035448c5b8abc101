"""A LoRA to PEFT's format for it, exactly: its layers are PEFT's own, so `PeftModel.from_pretrained` computes the same.

    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight   [r, i]     .lora_B.weight   [o, r]
                                                        .lora_embedding_A   [r, v]   .lora_embedding_B   [e, r]
    adapter_config.json         rank, alpha, dropout, and the names of the layers

Refused is what stands beside a LoRA in an artefact: a head, or a text that does not start at position 0.
"""

from collections.abc import Set
from pathlib import Path

from transformers import Conv1D, PreTrainedModel

from prefixkit.errors import ExportError
from prefixkit.export.adapter import TaskType, write_checkpoint
from prefixkit.models.fingerprint import check_base
from prefixkit.models.inspect import Kind, inspect_model
from prefixkit.prefix import Prefix

_WHERE = "base_model.model."
_TASKS = {Kind.DECODER: TaskType.CAUSAL_LM, Kind.ENCODER_DECODER: TaskType.SEQ_2_SEQ_LM}


def write_lora(prefix: Prefix, folder: Path, model: PreTrainedModel) -> None:
    """Write an artefact that is a LoRA alone as a PEFT checkpoint.

    Args:
        prefix: has no virtual tokens, and one delta, a LoRA.
        folder: where the two files go.
        model: the base model it was trained on.

    Raises:
        ExportError: PEFT's format cannot say what this artefact is, or the folder cannot be written to.
        BaseMismatchError: it belongs to another model.
    """
    card, delta = prefix.card, prefix.deltas[0]
    if prefix.head is not None:
        raise ExportError(
            "PEFT's LoRA format cannot say the head that was trained with this LoRA; attach the artefact, and read it "
            "with prefixkit.classify or prefixkit.tag"
        )
    if prefix.position_offset:
        raise ExportError(
            f"PEFT's LoRA format cannot say position_offset {prefix.position_offset}, at which the text stood beside a "
            "prefix; train a LoRA alone for it"
        )
    check_base(model, card.base)
    layers = {name.partition(".lora_")[0] for name in delta.tensors}
    known = dict(model.named_modules())
    missing = min(layers - known.keys(), default=None)
    if missing is not None:
        raise ExportError(f"lora: {missing} is no layer of this model; give the base model it was trained on")
    alpha = float(delta.settings["alpha"])
    values = {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": card.base.id,
        "revision": card.base.revision,
        "inference_mode": True,
        "r": delta.settings["rank"],
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": delta.settings["dropout"],
        "target_modules": _targets(layers, known.keys()),
        "fan_in_fan_out": any(isinstance(known[name], Conv1D) for name in layers),
        "bias": "none",
    }
    write_checkpoint(folder, values, {f"{_WHERE}{name}": tensor for name, tensor in delta.tensors.items()})


def _task(model: PreTrainedModel) -> str | None:
    """Return PEFT's name for what the model does; None has it leave the model's calls as they are."""
    task = _TASKS.get(inspect_model(model).kind)
    return task.value if task is not None and model.can_generate() and model.main_input_name == "input_ids" else None


def _targets(layers: Set[str], known: Set[str]) -> list[str]:
    """Return names PEFT finds these layers by and no others: the ends of theirs, if those are enough."""
    ends = {name.rpartition(".")[2] for name in layers}
    return sorted(ends if {name for name in known if name.rpartition(".")[2] in ends} == layers else layers)
