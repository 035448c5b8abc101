"""Classification heads to PEFT and back: the linear layer of transformers' own classes for texts and for words.

Such a class labels a whole text from its last token that is not padding, by a layer called `score` without a bias, and
a word from its token, by a layer with a bias in most families. A head trained here for whole texts reads an end-of-text
token or a mean, and has a bias: PEFT cannot say that. Classes that read something else first (BERT's pooler) call their
layer otherwise, and are refused.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedModel

from prefixkit.config import Pooling
from prefixkit.errors import ArtefactError, ExportError
from prefixkit.export.adapter import HEAD_NAMES, AdapterHead, TaskType
from prefixkit.logs import get_logger
from prefixkit.models.reading import last_hidden_state
from prefixkit.models.weights import input_device
from prefixkit.prefix import Head, HeadKind

log = get_logger(__name__)

_TASKS = {HeadKind.SEQUENCE: TaskType.SEQ_CLS, HeadKind.TOKEN: TaskType.TOKEN_CLS}
_CLASSES = {HeadKind.SEQUENCE: AutoModelForSequenceClassification, HeadKind.TOKEN: AutoModelForTokenClassification}


def task_of_head(head: Head | None) -> TaskType:
    """Return PEFT's name for what a prefix with such a head does."""
    return TaskType.CAUSAL_LM if head is None else _TASKS[head.kind]


def to_adapter(head: Head, model: PreTrainedModel) -> AdapterHead:
    """Return a head as the layer that transformers' own class of this model has for it.

    Args:
        head: the head.
        model: its base model.

    Raises:
        ExportError: transformers has no such class, or its layer cannot say what the head does.
    """
    if head.kind is HeadKind.SEQUENCE and head.pooling is not Pooling.LAST:
        what = "mean of its tokens" if head.pooling is Pooling.MEAN else "token behind it"
        raise ExportError(
            f"PEFT's format cannot say a head that labels a text from the {what}: transformers' own take the text's "
            "last token; the artefact holds prefix and head"
        )
    require_plain(model, ExportError)
    try:
        name, layer = _layer(head.kind, head.weight.shape, model)
    except _NoLayerError as error:
        raise ExportError(f"PEFT's format cannot say this head: {error}; the artefact holds prefix and head") from None
    if layer.bias is None and head.bias.any():
        raise ExportError(
            f"PEFT's format cannot say this head's bias: transformers' own head of this model, {name}, has none; the "
            "artefact holds prefix and head"
        )
    return AdapterHead(name, head.weight, None if layer.bias is None else head.bias)


class _NoLayerError(Exception):
    """transformers has no layer such as a head's; says why."""


def _layer(kind: HeadKind, shape: torch.Size, model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """Return transformers' layer for a head of this kind and shape on this model, and its name."""
    config = copy.deepcopy(model.config)
    config.num_labels = shape[0]
    what = "whole texts" if kind is HeadKind.SEQUENCE else "words"
    try:
        with torch.device("meta"):
            other = _CLASSES[kind].from_config(config)
    except ValueError:
        family = f"{type(model).__name__}'s family"
        raise _NoLayerError(f"transformers has no class of {family} with one for {what}") from None
    names = HEAD_NAMES[:1] if kind is HeadKind.SEQUENCE else HEAD_NAMES
    for name, layer in other.named_children():
        if name in names and isinstance(layer, nn.Linear) and layer.weight.shape == shape:
            return name, layer
    raise _NoLayerError(f"{type(other).__name__} has no such linear layer right behind the base model")


def require_plain(model: PreTrainedModel, kind: type[ArtefactError | ExportError]) -> None:
    """Refuse a model that has a head for labels itself: a prefix is bound to the base model without one."""
    for name, _ in model.named_children():
        if name in HEAD_NAMES:
            raise kind(
                f"{type(model).__name__}: has a head of its own ({name}), to which a prefix would be bound; give the "
                "base model as AutoModelForCausalLM loads it"
            )


def from_adapter(
    found: AdapterHead, task: TaskType, model: PreTrainedModel, labels: Sequence[str] | None, folder: Path
) -> Head:
    """Return the head of a checkpoint.

    Args:
        found: its layer.
        task: what it does.
        model: the base model.
        labels: names for its logits; left out, the model's `id2label`, or LABEL_0, LABEL_1, ...
        folder: the checkpoint, for messages.

    Raises:
        ArtefactError: it has another width than the model, fewer than two labels, or another number of them.
    """
    kind = HeadKind.TOKEN if task is TaskType.TOKEN_CLS else HeadKind.SEQUENCE
    count, width = found.weight.shape
    size = _width(model)
    if width != size:
        raise ArtefactError(f"{folder}: its head reads {width} numbers, this model gives {size}; load its base model")
    if count < 2:
        raise ArtefactError(f"{folder}: its head says one number (a regression), no label; it cannot be imported")
    try:
        name, layer = _layer(kind, found.weight.shape, model)
    except _NoLayerError as error:
        raise ArtefactError(f"{folder}: {found.name} cannot be imported as its head: {error}") from None
    if (name, layer.bias is None) != (found.name, found.bias is None):
        raise ArtefactError(
            f"{folder}: {found.name} is not the head of transformers' class of this model, {name}; load its base model"
        )
    bias = found.weight.new_zeros(count) if found.bias is None else found.bias
    pooling = Pooling.TOKEN if kind is HeadKind.TOKEN else Pooling.LAST
    return Head(kind, _names(labels, count, model), found.weight, bias, pooling)


@torch.no_grad()
def _width(model: PreTrainedModel) -> int:
    """Return how wide the hidden states are that a head reads; OPT projects some to another width."""
    token = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    return last_hidden_state(model, {"input_ids": token, "attention_mask": torch.ones_like(token)}).shape[-1]


def _names(given: Sequence[str] | None, count: int, model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of a head's labels: those given, those the model's configuration has, or numbered ones."""
    if given is not None:
        is_list = isinstance(given, list | tuple) and all(isinstance(name, str) and name.strip() for name in given)
        if not is_list or len(given) != count or len(set(given)) != count:
            said = ", ".join(map(repr, given)) if isinstance(given, list | tuple) else repr(given)
            raise ArtefactError(f"labels: expected a list of {count} different names, got {said}")
        return tuple(given)
    known: dict[Any, Any] = model.config.id2label or {}
    own = [str(known.get(number, "")) for number in range(count)]
    if len(known) == count == len(set(own)) and all(own):
        if own != [f"LABEL_{number}" for number in range(count)]:
            log.info("labels named as in the base model's configuration: %s", ", ".join(own))
        return tuple(own)
    return tuple(f"LABEL_{number}" for number in range(count))
