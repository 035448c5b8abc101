"""PEFT's `PeftModel` for prefix tuning: a base model with a prefix, as one module.

The base model reads the prefix inside `forward` and `generate` only; called by itself it is the base model, as with
PEFT. Under gradient checkpointing, which PEFT refuses, layers run again in the backward pass: the hooks then stay in
place between calls, with nothing to read. What becomes of calls that overlap is in `calls.py`.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.compat import trains_beside_its_base
from prefixkit.errors import ConfigError
from prefixkit.models.fingerprint import fingerprint
from prefixkit.models.weights import input_device
from prefixkit.peft.arguments import LOADING, SAVING, check_others
from prefixkit.peft.calls import Wanted, calls_of
from prefixkit.peft.config import PrefixTuningConfig, require_own
from prefixkit.peft.loading import LENGTHS, POSITION, load_prefix, save_prefix
from prefixkit.peft.lookup import look_up, one_prefix
from prefixkit.prefix import BaseCard, Prefix, PrefixEncoder, reproduce

#: Models whose prefix is left out, in this thread or task.
_disabled: ContextVar[frozenset[nn.Module]] = ContextVar("disabled", default=frozenset())


@trains_beside_its_base
class PeftModel(nn.Module):
    """A frozen base model with a prefix; made by `get_peft_model` or `from_pretrained`.

    What it does not have itself (`config`, `device`, ...) is looked up on the base model, unless it could run that
    without the prefix.

    Args:
        base: the base model; its parameters stop wanting gradients.
        prefix: an encoder to train, or a trained prefix.
        config: what the prefix is, in PEFT's words.
        position_offset: for an encoder, the position of the first text token; its length if left out.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        prefix: PrefixEncoder | Prefix,
        config: PrefixTuningConfig,
        position_offset: int | None = None,
    ) -> None:
        super().__init__()
        self.base_model = base.requires_grad_(False)
        self.encoder = prefix if isinstance(prefix, PrefixEncoder) else None
        self.peft_config = {"default": config}
        self.active_adapter = "default"
        takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(base.forward).parameters.values())
        #: Tells transformers' Trainer whether the base model divides its loss by `num_items_in_batch`.
        self.accepts_loss_kwargs: bool = getattr(base, "accepts_loss_kwargs", takes_any)
        self._trained = prefix if isinstance(prefix, Prefix) else None
        self._position_offset = position_offset

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        **others: Any,
    ) -> "PeftModel":
        """Load a saved prefix: an artefact, or what PEFT's own `save_pretrained` wrote.

        Args:
            model: its base model, with nothing attached.
            model_id: the folder.
            adapter_name: only ``"default"``.
            is_trainable: train on from the saved keys and values (which PEFT cannot).
            config: what `PrefixTuningConfig.from_pretrained` returned, if it was asked; it must be the folder's.
            others: PEFT's remaining arguments, at values that change nothing here.

        Raises:
            ArtefactError: the folder holds no prefix, a damaged one, or two that differ.
            ConfigError: an argument is unknown or asks for what is not done here, or `config` is another prefix's.
            BaseMismatchError: the prefix belongs to another base model.
        """
        if adapter_name != "default":
            raise ConfigError(one_prefix(adapter_name))
        check_others("PeftModel.from_pretrained", others, LOADING)
        given = None if config is None else require_own(config, "config")
        prefix = load_prefix(Path(model_id), model)
        config = PrefixTuningConfig.of(prefix)
        if given is not None:
            given.require_same(config)
        if not is_trainable:
            return cls(model, prefix, config).eval()
        states = prefix.states
        encoder = PrefixEncoder(states.geometry, states.lengths, gated=states.has_gate).to(input_device(model))
        reproduce(encoder, states)
        return cls(model, encoder, config, prefix.position_offset)

    @property
    def prefix(self) -> Prefix:
        """The prefix as it is now, materialised: what `save_pretrained` writes and `attach` takes."""
        if self.encoder is None:
            assert self._trained is not None
            return self._trained
        config = self.peft_config["default"]
        name = config.base_model_name_or_path or self.base_model.config.name_or_path or type(self.base_model).__name__
        base = BaseCard(id=name, revision=config.revision, fingerprint=fingerprint(self.base_model))
        return Prefix.from_states(self.encoder.materialise(), base=base, position_offset=self._position_offset)

    @property
    def generation_config(self) -> Any:
        """What `generate` does where nothing else is said; the base model's own."""
        return self.base_model.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.base_model.generation_config = config

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
        with self._reading(self.encoder if self.encoder is not None else self._trained):
            return self.base_model(**{key: value for key, value in given.items() if value is not None}, **options)

    def generate(self, *args: Any, **options: Any) -> Any:
        """Call the base model's `generate` with the prefix in front; the MLP, if there is one, runs once."""
        base: Any = self.base_model
        with self._reading(self.prefix):
            return base.generate(*args, **options)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        **others: Any,
    ) -> None:
        """Write the artefact, and beside it PEFT's files where PEFT's format can say what the prefix is.

        Args:
            save_directory: where to.
            safe_serialization: only True.
            selected_adapters: only ``["default"]``.
            save_embedding_layers: not True.
            is_main_process: False writes nothing: of several processes, one does.
            others: PEFT's remaining arguments, at values that change nothing here.

        Raises:
            ArtefactError: the folder cannot be written to.
            ConfigError: an argument asks for what is not done here.
        """
        others |= {"safe_serialization": safe_serialization, "selected_adapters": selected_adapters,
                   "save_embedding_layers": save_embedding_layers}  # fmt: skip
        check_others("save_pretrained", others, SAVING)
        if is_main_process:
            save_prefix(self.prefix, save_directory, self.base_model)

    def get_base_model(self) -> PreTrainedModel:
        """Return the base model."""
        return self.base_model

    def unload(self) -> PreTrainedModel:
        """Detach the prefix and return the base model as it was, but for its parameters' `requires_grad`."""
        calls_of(self.base_model).detach()
        return self.base_model

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Be the base model, without the prefix, for a while; other threads are not concerned."""
        token = _disabled.set(_disabled.get() | {self})
        try:
            yield
        finally:
            _disabled.reset(token)

    @property
    def active_peft_config(self) -> PrefixTuningConfig:
        """The configuration of what is active: the one prefix."""
        return self.peft_config[self.active_adapter]

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method."""
        return self.active_peft_config.peft_type

    @property
    def active_adapters(self) -> list[str]:
        """Names of what is active: the one prefix."""
        return [self.active_adapter]

    def set_adapter(self, adapter_name: str) -> None:
        """Do nothing: there is one prefix, and it is active.

        Raises:
            ConfigError: another name than ``"default"``.
        """
        if adapter_name != "default":
            raise ConfigError(one_prefix(adapter_name))

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
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute activations in the backward pass; the kind that is exact with a prefix, unless asked otherwise."""
        kinds = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        self.base_model.activation_checkpointing_enable(kinds, **options)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Do the same by its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again, and let go of the base model, which layers to be run again had kept attached.

        Raises:
            InjectionError: a call is under way.
        """
        calls_of(self.base_model).detach()
        self.base_model.activation_checkpointing_disable()

    def gradient_checkpointing_disable(self) -> None:
        """Do the same by its older name."""
        self.activation_checkpointing_disable()

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """Return the encoder's parameters and places alone: a Trainer's checkpoints hold no base model."""
        if self.encoder is None:
            return {}
        state = self.encoder.state_dict(*args, **options)
        position = self.encoder.geometry.text_position(
            self.encoder.lengths, is_gated=self.encoder.gates is not None, asked=self._position_offset
        )
        where: str = options.get("prefix", "")
        state[where + POSITION] = torch.tensor(position)
        if self.encoder.depth and len(set(self.encoder.lengths)) > 1:
            state[where + LENGTHS] = torch.tensor(self.encoder.lengths)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave; with an MLP, too, a Trainer resumes exactly."""
        if self.encoder is None:
            raise ConfigError("this prefix is not in training; load it with from_pretrained(..., is_trainable=True)")
        lengths = state_dict.get(LENGTHS)
        if lengths is not None and tuple(lengths.tolist()) != self.encoder.lengths:
            raise ConfigError("placement: the saved prefix stands in other attention stacks; make this one like it")
        own = {name: value for name, value in state_dict.items() if name not in (POSITION, LENGTHS)}
        if POSITION in state_dict:
            self._position_offset = int(state_dict[POSITION])
        return self.encoder.load_state_dict(own, strict=strict, assign=assign)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
        return look_up(self.base_model, name)

    def _reading(self, prefix: PrefixEncoder | Prefix | None) -> AbstractContextManager[None]:
        """Let the base model read a prefix; afterwards it reads nothing.

        Under gradient checkpointing it keeps its hooks, for layers that are run again in a backward pass.
        """
        offset = self._position_offset if isinstance(prefix, PrefixEncoder) else None
        wanted = Wanted(None) if self in _disabled.get() else Wanted(prefix, offset)
        return calls_of(self.base_model).reading(self, self.base_model, wanted)
