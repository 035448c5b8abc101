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
from torch import nn
from transformers import PreTrainedModel

from prefixkit.compat import trains_beside_its_base
from prefixkit.errors import ConfigError
from prefixkit.peft.arguments import LOADING, SAVING, check_others
from prefixkit.peft.calls import Wanted, calls_of
from prefixkit.peft.config import PrefixTuningConfig, require_own
from prefixkit.peft.loading import (
    FINGERPRINT,
    LENGTHS,
    POSITION,
    as_fingerprint,
    base_card,
    check_fingerprint,
    encoder_of,
    load_prefix,
    save_prefix,
)
from prefixkit.peft.lookup import look_up, one_prefix
from prefixkit.peft.wrapped import WrappedModel
from prefixkit.prefix import Prefix, PrefixEncoder

#: Models whose prefix is left out, in this thread or task.
_disabled: ContextVar[frozenset[nn.Module]] = ContextVar("disabled", default=frozenset())


@trains_beside_its_base
class PeftModel(WrappedModel):
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
        return cls(model, encoder_of(model, prefix), config, prefix.position_offset)

    @property
    def prefix(self) -> Prefix:
        """The prefix as it is now, materialised: what `save_pretrained` writes and `attach` takes."""
        if self.encoder is None:
            assert self._trained is not None
            return self._trained
        config = self.peft_config["default"]
        base = base_card(self.base_model, config.base_model_name_or_path, config.revision)
        return Prefix.from_states(self.encoder.materialise(), base=base, position_offset=self._position_offset)

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

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again, and let go of the base model, which layers to be run again had kept attached.

        Raises:
            InjectionError: a call is under way.
        """
        calls_of(self.base_model).detach()
        super().activation_checkpointing_disable()

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """Return the encoder's parameters and places alone: a Trainer's checkpoints hold no base model."""
        if self.encoder is None:
            return {}
        state = self.encoder.state_dict(*args, **options)
        where: str = options.get("prefix", "")
        state[where + POSITION] = torch.tensor(self.encoder.text_position(self._position_offset))
        if self.encoder.depth and len(set(self.encoder.lengths)) > 1:
            state[where + LENGTHS] = torch.tensor(self.encoder.lengths)
        state[where + FINGERPRINT] = as_fingerprint(self.base_model)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave; with an MLP, too, a Trainer resumes exactly."""
        if self.encoder is None:
            raise ConfigError("this prefix is not in training; load it with from_pretrained(..., is_trainable=True)")
        lengths = state_dict.get(LENGTHS)
        if lengths is not None and tuple(lengths.tolist()) != self.encoder.lengths:
            raise ConfigError("placement: the saved prefix stands in other attention stacks; make this one like it")
        check_fingerprint(self.base_model, state_dict.get(FINGERPRINT))
        own = {name: value for name, value in state_dict.items() if name not in (POSITION, LENGTHS, FINGERPRINT)}
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

    def _forwarding(self) -> AbstractContextManager[None]:
        return self._reading(self.encoder if self.encoder is not None else self._trained)

    def _generating(self) -> AbstractContextManager[None]:
        return self._reading(self.prefix)

    def _reading(self, prefix: PrefixEncoder | Prefix | None) -> AbstractContextManager[None]:
        """Let the base model read a prefix; afterwards it reads nothing.

        Under gradient checkpointing it keeps its hooks, for layers that are run again in a backward pass.
        """
        offset = self._position_offset if isinstance(prefix, PrefixEncoder) else None
        wanted = Wanted(None) if self in _disabled.get() else Wanted(prefix, offset)
        return calls_of(self.base_model).reading(self, self.base_model, wanted)
