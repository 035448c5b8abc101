"""What `PeftModel` and `HybridModel` have in common: a frozen base model as the part of a module that is trained."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


class WrappedModel(nn.Module):
    """A base model, and what it reads while it is called through this module.

    Attributes:
        base_model: the base model.
    """

    base_model: PreTrainedModel

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Call the base model with the prefix in front; returns what the base model returns.

        Masks, `position_ids` and `labels` are those of the text alone. Further arguments have other places in every
        model, and in PEFT: they go by name. Trainer passes on of a data set what is named here.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
                 "inputs_embeds": inputs_embeds, "decoder_input_ids": decoder_input_ids,
                 "decoder_attention_mask": decoder_attention_mask, "decoder_inputs_embeds": decoder_inputs_embeds,
                 "labels": labels}  # fmt: skip
        with self._forwarding():
            return self.base_model(**{key: value for key, value in given.items() if value is not None}, **options)

    def generate(self, *args: Any, **options: Any) -> Any:
        """Call the base model's `generate` with the prefix in front; the MLP, if there is one, runs once."""
        base: Any = self.base_model
        with self._generating():
            return base.generate(*args, **options)

    def _forwarding(self) -> AbstractContextManager[None]:
        """Let the base model read what `forward` reads; what is in it all the time needs no letting."""
        return nullcontext()

    def _generating(self) -> AbstractContextManager[None]:
        """Let the base model read what `generate` reads."""
        return nullcontext()

    @property
    def generation_config(self) -> Any:
        """What `generate` does where nothing else is said; the base model's own."""
        return self.base_model.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.base_model.generation_config = config

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield parameters, but not what stands in their place in the base model: trained numbers in another format."""
        found = super().named_parameters(*args, **options)
        return ((name, parameter) for name, parameter in found if parameter.is_leaf)

    def get_base_model(self) -> PreTrainedModel:
        """Return the base model."""
        return self.base_model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many numbers are trained, and how many there are."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print them, as PEFT does."""
        trained, all_there_are = self.get_nb_trainable_parameters()
        share = 100 * trained / all_there_are
        print(f"trainable params: {trained:,d} || all params: {all_there_are:,d} || trainable%: {share:.4f}")

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute activations in the backward pass; the kind that is exact with a prefix, unless asked otherwise."""
        kinds = {"use_reentrant": False} | dict(activation_checkpointing_kwargs or {})
        self.base_model.activation_checkpointing_enable(kinds, **options)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Do the same by its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.base_model.activation_checkpointing_disable()

    def gradient_checkpointing_disable(self) -> None:
        """Do the same by its older name."""
        self.activation_checkpointing_disable()
