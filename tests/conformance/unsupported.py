"""What no kind of model can do with a prefix, and how that is said: checks shared by the files of each kind."""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from conformance.record import Cell
from prefixkit.errors import InjectionError, UnsupportedModelError
from prefixkit.injection import attach
from prefixkit.prefix import PrefixEncoder, PrefixStates, reproduce

REENTRANT = "use_reentrant=True gives a prefix wrong gradients or none; enable it with"


def check_reentrant_is_refused(cell: Cell, model: PreTrainedModel, states: PrefixStates, **inputs: Any) -> None:
    """Reentrant checkpointing is refused on a training pass over these inputs."""
    encoder = PrefixEncoder(states.geometry, states.lengths, dtype=torch.float64)
    reproduce(encoder, states)
    model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=True))
    with attach(model.train(), encoder), cell.refused(InjectionError, REENTRANT):
        model(**inputs)


def check_flex_is_refused(cell: Cell, model: PreTrainedModel) -> None:
    """A model that asks for flex attention is refused."""
    model.config._attn_implementation_internal = "flex_attention"
    with cell.refused(UnsupportedModelError, "attention implementation 'flex_attention' is not supported; load the"):
        attach(model, None)
