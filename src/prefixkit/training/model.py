"""What the trainer trains: a frozen base model with a prefix, or with another method's numbers, and perhaps a head."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.compat import keep_activations, leave_out_of_ddp
from prefixkit.data import NO_LOSS, input_ends
from prefixkit.injection import Handle, attach
from prefixkit.methods import DeltaModule, SoftPrompt
from prefixkit.models.inspect import inspect_model, recomputable_layers
from prefixkit.models.text_states import embedding_states
from prefixkit.models.weights import input_device, is_offloaded
from prefixkit.prefix import ClassificationHead, Delta, Head, PrefixEncoder, PrefixStates
from prefixkit.training.loss import has_plain_head, labelling_loss, summed_loss

_HEAD, _DELTA, _UNITS = "head.", "delta.", "units"

#: What makes the keys and values that are trained.
Encoder = PrefixEncoder | SoftPrompt


class Part(StrEnum):
    """What may be trained, each at a rate of its own."""

    PREFIX = "prefix"
    METHOD = "method"
    HEAD = "head"


@dataclass(frozen=True)
class Trained:
    """What was trained, as plain tensors.

    Attributes:
        states: keys and values; without virtual tokens where another method was trained.
        head: the classification head; None where text is learned.
        deltas: what was changed in the base model's layers.
    """

    states: PrefixStates
    head: Head | None = None
    deltas: tuple[Delta, ...] = ()


class PrefixModel(nn.Module):
    """A base model with what is trained attached: a prefix, a change of its layers, or both; and perhaps a head on it.

    Args:
        base: the frozen base model.
        encoder: the prefix, or a soft prompt; None where neither is trained.
        position_offset: position of the first text token; None for the geometry's own, as in `attach`.
        head: the classification head, where labels are learned; None where text is.
        delta: a change of the base model's layers, or None.
        infix: the prefix stands between input and target.
        recomputed: layers under gradient checkpointing, counted from the first; all if left out.
    """

    #: Tells transformers' Trainer that the loss is divided by `num_items_in_batch` here.
    accepts_loss_kwargs = True

    def __init__(
        self,
        base: PreTrainedModel,
        encoder: Encoder | None,
        position_offset: int | None,
        head: ClassificationHead | None = None,
        delta: DeltaModule | None = None,
        *,
        infix: bool = False,
        recomputed: int | None = None,
    ) -> None:
        super().__init__()
        self.delta = delta  # before the base model, which holds its numbers too while they are inserted
        is_read_plainly = delta is None or not delta.touches(base.get_output_embeddings())
        self.plain_head = head is None and is_read_plainly and has_plain_head(base)
        self.base = base.requires_grad_(False)
        self.encoder = encoder
        self.head = head
        self.position_offset = position_offset
        placed: dict[str, Any] = getattr(base, "hf_device_map", None) or {"": "disk"}
        if is_offloaded(base) or len(placed) > 1:
            # Under this name transformers' Trainer and accelerate look for models they must not move.
            self.hf_device_map = {f"base.{name}": place for name, place in placed.items()}
            self.hf_device_map |= {name: str(input_device(base)) for name in ("encoder", "head", "delta")}
        leave_out_of_ddp(self, [f"base.{name}" for name, _ in (*base.named_parameters(), *base.named_buffers())])
        self._is_recomputing = False
        self._is_infix = infix
        self._recomputed = recomputed
        self._handle = self._attach()

    def _attach(self) -> Handle:
        deltas = () if self.delta is None else (self.delta,)
        return attach(
            self.base, self.encoder, position_offset=self.position_offset, deltas=deltas, infix=self._is_infix
        )

    def parts(self) -> dict[Part, list[nn.Parameter]]:
        """Return the numbers that are trained, by part; a part that is not there or stands still is left out."""
        modules = {Part.PREFIX: self.encoder, Part.METHOD: self.delta, Part.HEAD: self.head}
        if isinstance(self.encoder, SoftPrompt):
            modules |= {Part.PREFIX: None, Part.METHOD: self.encoder}
        numbers = {
            part: [number for number in module.parameters() if number.requires_grad]
            for part, module in modules.items()
            if module is not None
        }
        return {part: own for part, own in numbers.items() if own}

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield parameters, but not what stands in their place in the base model for the time of a forward pass."""
        found = super().named_parameters(*args, **options)
        return ((name, parameter) for name, parameter in found if parameter.is_leaf)

    def materialise(self) -> Trained:
        """Return what has been trained so far; nothing is attached to the base model meanwhile."""
        head = None if self.head is None else self.head.materialise()
        deltas = () if self.delta is None else (self.delta.materialise(),)
        if isinstance(self.encoder, PrefixEncoder):
            return Trained(self.encoder.materialise(), head, deltas)
        if self.encoder is None:
            return Trained(PrefixStates.empty(inspect_model(self.base).geometry), head, deltas)
        with self.set_aside():
            return Trained(embedding_states(self.base, self.encoder.materialise()), head, deltas)

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
            with self._handle.infix_at(input_ends(labels)):
                total, scored = summed_loss(self.base, batch, labels, plain_head=self.plain_head), labels[:, 1:]
        count = (scored != NO_LOSS).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count}

    def trained_state(self) -> dict[str, Tensor]:
        """Return what training goes on with, by name: the encoder's state, then ``head.``, ``delta.``."""
        state = {} if self.encoder is None else dict(self.encoder.state_dict())
        if self.head is not None:
            state |= {f"{_HEAD}{name}": tensor for name, tensor in self.head.state_dict().items()}
        if self.delta is not None:
            state |= {f"{_DELTA}{name}": number.detach() for name, number in self.delta.named().items()}
        return state

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `trained_state` returned."""
        if self.encoder is not None:
            others = (_HEAD, _DELTA)
            own = {name: t for name, t in state.items() if not name.startswith(others)}
            if isinstance(self.encoder, SoftPrompt) and (units := own.pop(_UNITS, None)) is not None:  # an older one
                own |= {f"source.{_UNITS}": units} if isinstance(self.encoder.source, PrefixEncoder) else {}
            self.encoder.load_state_dict(own)
        if self.head is not None:
            self.head.load_state_dict(_behind(_HEAD, state))
        if self.delta is not None:
            self.delta.load(_behind(_DELTA, state))

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute the base model's activations in the backward pass; called by transformers' Trainer."""
        self.base.activation_checkpointing_enable({"use_reentrant": False})
        if self._recomputed is not None:
            keep_activations(recomputable_layers(self.base)[self._recomputed :])
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
            self._handle = self._attach()

    def close(self) -> None:
        """Detach the prefix; the base model is as it was."""
        self._handle.detach()
        if self._is_recomputing:
            self.base.activation_checkpointing_disable()
        self.base.eval()


def _behind(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
