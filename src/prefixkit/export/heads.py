"""Classification heads to PEFT and back: the linear layer of transformers' own classes for texts and for words.

Such a class labels a whole text from its last token, by a layer without a bias, and a word from its token, by a layer
with one in most families. A head trained here for whole texts reads an end-of-text token or a mean, and has a bias:
PEFT cannot say that.
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
from prefixkit.export.adapter import HEAD_NAMES, AdapterHead, Task
from prefixkit.prefix import Head, HeadKind

_TASKS = {HeadKind.SEQUENCE: Task.SEQ_CLS, HeadKind.TOKEN: Task.TOKEN_CLS}
_CLASSES = {HeadKind.SEQUENCE: AutoModelForSequenceClassification, HeadKind.TOKEN: AutoModelForTokenClassification}


def task_of(head: Head | None) -> Task:
    """Return PEFT's name for what a prefix with such a head does."""
    return Task.CAUSAL_LM if head is None else _TASKS[head.kind]


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
    name, layer = _layer(head, model)
    if layer.bias is None and head.bias.any():
        raise ExportError(
            f"PEFT's format cannot say this head's bias: transformers' own head of this model, {name}, has none; the "
            "artefact holds prefix and head"
        )
    return AdapterHead(name, head.weight, None if layer.bias is None else head.bias)


def _layer(head: Head, model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """Return transformers' layer for a head of this model, and its name."""
    config = copy.deepcopy(model.config)
    config.num_labels = len(head.labels)
    try:
        with torch.device("meta"):
            other = _CLASSES[head.kind].from_config(config)
    except ValueError:
        what = "whole texts" if head.kind is HeadKind.SEQUENCE else "words"
        raise ExportError(
            f"PEFT's format cannot say this head: transformers has no class of {type(model).__name__}'s family with "
            f"one for {what}; the artefact holds prefix and head"
        ) from None
    for name, layer in other.named_children():
        if name in HEAD_NAMES and isinstance(layer, nn.Linear) and layer.weight.shape == head.weight.shape:
            return name, layer
    raise ExportError(
        f"PEFT's format cannot say this head: {type(other).__name__} has no linear layer of its shape; the artefact "
        "holds prefix and head"
    )


def from_adapter(
    found: AdapterHead, task: Task, model: PreTrainedModel, labels: Sequence[str] | None, folder: Path
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
    count, width = found.weight.shape
    size = model.config.get_text_config().hidden_size
    if width != size:
        raise ArtefactError(f"{folder}: its head reads {width} numbers, this model has {size}; load its base model")
    if count < 2:
        raise ArtefactError(f"{folder}: its head says one number (a regression), no label; it cannot be imported")
    if labels is not None and (len(labels) != count or len(set(labels)) != count):
        raise ArtefactError(f"labels: expected {count} different names, got {', '.join(labels)}")
    known: dict[Any, str] = model.config.id2label or {}
    own = [known.get(number, "") for number in range(count)]
    if labels is None:
        labels = own if len(set(known.values()) - {""}) == count and all(own) else [f"LABEL_{i}" for i in range(count)]
    bias = found.weight.new_zeros(count) if found.bias is None else found.bias
    if task is Task.TOKEN_CLS:
        return Head(HeadKind.TOKEN, tuple(labels), found.weight, bias)
    return Head(HeadKind.SEQUENCE, tuple(labels), found.weight, bias, Pooling.LAST)
