"""What the trainer trains: a frozen base model that reads the prefix encoder's output, and perhaps a head on it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.compat import leave_out_of_ddp
from prefixkit.data import NO_LOSS
from prefixkit.injection import attach
from prefixkit.models.weights import input_device, is_offloaded
from prefixkit.prefix import ClassificationHead, PrefixEncoder
from prefixkit.training.loss import has_plain_head, labelling_loss, summed_loss

_HEAD, _UNITS = "head.", "units"


class PrefixModel(nn.Module):
    """A base model with a prefix in training attached; only the encoder, and the head, have trainable parameters.

    Args:
        base: the frozen base model.
        encoder: the prefix.
        position_offset: position of the first text token; None for the geometry's own, as in `attach`.
        head: the classification head, where labels are learned; None where text is.
    """

    #: Tells transformers' Trainer that the loss is divided by `num_items_in_batch` here.
    accepts_loss_kwargs = True

    def __init__(
        self,
        base: PreTrainedModel,
        encoder: PrefixEncoder,
        position_offset: int | None,
        head: ClassificationHead | None = None,
    ) -> None:
        super().__init__()
        self.plain_head = head is None and has_plain_head(base)
        self.base = base.requires_grad_(False)
        self.encoder = encoder
        self.head = head
        self.position_offset = position_offset
        placed: dict[str, Any] = getattr(base, "hf_device_map", None) or {"": "disk"}
        if is_offloaded(base) or len(placed) > 1:
            # Under this name transformers' Trainer and accelerate look for models they must not move.
            self.hf_device_map = {f"base.{name}": place for name, place in placed.items()}
            self.hf_device_map |= {name: str(input_device(base)) for name in ("encoder", "head")}
        leave_out_of_ddp(self, [f"base.{name}" for name, _ in (*base.named_parameters(), *base.named_buffers())])
        self._is_recomputing = False
        self._handle = attach(base, encoder, position_offset=position_offset)

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"],
        labels: Int[Tensor, "b u"],
        decoder_input_ids: Int[Tensor, "b u"] | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Return the loss: the mean over the scored places of the whole optimiser step.

        Args:
            input_ids: tokens; an encoder-decoder's encoder reads them.
            attention_mask: 1 for text, 0 for padding.
            labels: tokens with loss, or classes where the head looks; -100 elsewhere.
            decoder_input_ids: what an encoder-decoder's decoder reads.
            num_items_in_batch: scored places of the whole step (all accumulated batches); this batch's if None.
        """
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        batch |= {} if decoder_input_ids is None else {"decoder_input_ids": decoder_input_ids}
        if self.head is not None:
            total, scored = labelling_loss(self.base, self.head, batch, labels), labels
        else:
            total, scored = summed_loss(self.base, batch, labels, plain_head=self.plain_head), labels[:, 1:]
        count = (scored != NO_LOSS).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count}

    def trained_state(self) -> dict[str, Tensor]:
        """Return the trained parameters by name: the encoder's and its ``units``, the head's behind ``head.``."""
        head = {} if self.head is None else self.head.state_dict()
        head = {f"{_HEAD}{name}": tensor for name, tensor in head.items()}
        return self.encoder.state_dict() | {_UNITS: self.encoder.units} | head

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `trained_state` returned."""
        rest = {name: tensor for name, tensor in state.items() if name != _UNITS and not name.startswith(_HEAD)}
        self.encoder.load_state_dict(rest)
        self.encoder.units.copy_(state.get(_UNITS, torch.ones_like(self.encoder.units)))  # older ones have no units
        if self.head is not None:
            self.head.load_state_dict(
                {name.removeprefix(_HEAD): t for name, t in state.items() if name.startswith(_HEAD)}
            )

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute the base model's activations in the backward pass; called by transformers' Trainer."""
        self.base.activation_checkpointing_enable({"use_reentrant": False})
        self.base.disable_input_require_grads()  # a prefix brings its own gradient into every layer
        self._is_recomputing = True

    @contextmanager
    def set_aside(self) -> Iterator[PreTrainedModel]:
        """Yield the bare base model in evaluation mode, with nothing attached; restore everything afterwards."""
        was_training = self.training
        self._handle.detach()
        self.eval()
        try:
            yield self.base
        finally:
            self.train(was_training)
            self._handle = attach(self.base, self.encoder, position_offset=self.position_offset)

    def close(self) -> None:
        """Detach the prefix; the base model is as it was."""
        self._handle.detach()
        if self._is_recomputing:
            self.base.activation_checkpointing_disable()
        self.base.eval()
