"""What the trainer trains: a frozen base model that reads the prefix encoder's output."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.data import NO_LOSS
from prefixkit.injection import attach
from prefixkit.models.weights import input_device, is_offloaded
from prefixkit.prefix import PrefixEncoder
from prefixkit.training.loss import has_plain_head, summed_loss


class PrefixModel(nn.Module):
    """A base model with a prefix in training attached; only the encoder has trainable parameters.

    Args:
        base: the frozen base model.
        encoder: the prefix.
        position_offset: position of the first text token; None for the geometry's own, as in `attach`.
    """

    #: Tells transformers' Trainer that the loss is divided by `num_items_in_batch` here.
    accepts_loss_kwargs = True

    def __init__(self, base: PreTrainedModel, encoder: PrefixEncoder, position_offset: int | None) -> None:
        super().__init__()
        self.plain_head = has_plain_head(base)
        self.base = base.requires_grad_(False)
        self.encoder = encoder
        self.position_offset = position_offset
        placed: dict[str, Any] = getattr(base, "hf_device_map", None) or {"": "disk"}
        if is_offloaded(base) or len(placed) > 1:
            # Under this name transformers' Trainer and accelerate look for models they must not move.
            self.hf_device_map = {f"base.{name}": place for name, place in placed.items()}
            self.hf_device_map["encoder"] = str(input_device(base))
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
        """Return the loss: the mean over the scored tokens of the whole optimiser step.

        Args:
            input_ids: tokens; an encoder-decoder's encoder reads them.
            attention_mask: 1 for text, 0 for padding.
            labels: tokens with loss; -100 elsewhere.
            decoder_input_ids: what an encoder-decoder's decoder reads.
            num_items_in_batch: scored tokens of the whole step (all accumulated batches); this batch's if None.
        """
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        batch |= {} if decoder_input_ids is None else {"decoder_input_ids": decoder_input_ids}
        total = summed_loss(self.base, batch, labels, plain_head=self.plain_head)
        count = (labels[:, 1:] != NO_LOSS).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count}

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
