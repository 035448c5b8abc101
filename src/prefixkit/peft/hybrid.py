"""A prefix and PEFT's LoRA or IA3 in one model: what `get_peft_model(base, [prefix_config, lora_config])` returns.

Both parts stand in the base model from the beginning until `unload`, as PEFT's own LoRA does; the base model called by
itself meanwhile reads them too. They are saved, loaded and switched as one artefact, and each can be turned off.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.config import Method, MethodConfig
from prefixkit.errors import ArtefactError, ConfigError
from prefixkit.injection import Handle, attach
from prefixkit.methods import DeltaModule, build_delta, restore_delta
from prefixkit.models.fingerprint import check_base
from prefixkit.peft.config import PrefixTuningConfig
from prefixkit.peft.loading import FINGERPRINT, POSITION, as_fingerprint, base_card, check_fingerprint, encoder_of
from prefixkit.peft.start import new_encoder
from prefixkit.peft.wrapped import WrappedModel
from prefixkit.prefix import Prefix, PrefixEncoder

if TYPE_CHECKING:
    from peft import IA3Config, LoraConfig

#: Settings of PEFT's configurations that mean nothing to the layers, or are read below.
_READ = {"r", "lora_alpha", "lora_dropout", "target_modules"}
_IGNORED = {"task_type", "peft_type", "base_model_name_or_path", "revision", "inference_mode", "fan_in_fan_out",
            "auto_mapping", "peft_version"}  # fmt: skip


class HybridModel(WrappedModel):
    """A frozen base model with a prefix and another method's layers; made by `get_peft_model` or `from_pretrained`.

    Args:
        base: the base model, with nothing attached; its parameters stop wanting gradients.
        encoder: the prefix.
        delta: the other part.
        base_id: name of the base model, kept in what is saved; its own if left out.
        revision: of the base model, likewise.
        position_offset: position of the first text token; the prefix's length if left out.
    """

    #: Tells transformers' Trainer to divide the loss itself.
    accepts_loss_kwargs = False

    def __init__(
        self,
        base: PreTrainedModel,
        encoder: PrefixEncoder,
        delta: DeltaModule,
        *,
        base_id: str | None = None,
        revision: str | None = None,
        position_offset: int | None = None,
    ) -> None:
        super().__init__()
        self.delta = delta  # before the base model, which holds its numbers too
        self.base_model = base.requires_grad_(False)
        self.encoder = encoder
        self._base_id, self._revision = base_id, revision
        self._position = encoder.text_position(position_offset)
        self._handle: Handle | None = None
        self._put(frozenset(), is_in=True)

    @classmethod
    def from_pretrained(
        cls, model: PreTrainedModel, folder: str | Path, *, is_trainable: bool = False
    ) -> "HybridModel":
        """Load a hybrid that was saved, or trained with `prefixkit train method=prefix+lora`, say.

        Args:
            model: its base model, with nothing attached.
            folder: the artefact, or a run.
            is_trainable: train on from the saved numbers.

        Raises:
            ArtefactError: the folder holds no hybrid of a prefix and one other part, or a damaged one.
            BaseMismatchError: it belongs to another base model.
        """
        prefix = Prefix.load(folder)
        check_base(model, prefix.card.base)
        is_plain = prefix.head is None and not prefix.is_infix
        if not any(prefix.states.lengths) or len(prefix.deltas) != 1 or not is_plain:
            found = "an infix" if prefix.is_infix else " and ".join(prefix.parts) or "nothing"
            raise ArtefactError(f"{folder}: expected a prefix and one other part, found {found}; see prefixkit.attach")
        encoder, delta = encoder_of(model, prefix), restore_delta(model, prefix.deltas[0]).requires_grad_(is_trainable)
        if not is_trainable:
            encoder.requires_grad_(False)
        base = prefix.card.base
        made = cls(
            model, encoder, delta, base_id=base.id, revision=base.revision, position_offset=prefix.position_offset
        )
        return made.train(is_trainable)

    @property
    def prefix(self) -> Prefix:
        """Both parts as they are now, as an artefact: what `save_pretrained` writes and `attach` takes."""
        with self._detached():
            base = base_card(self.base_model, self._base_id, self._revision)
        states, deltas = self.encoder.materialise(), [self.delta.materialise()]
        return Prefix.from_states(states, base=base, position_offset=self._position, deltas=deltas)

    def parameter_groups(self, **rates: float) -> list[dict[str, Any]]:
        """Return what an optimiser takes, with a learning rate for each part.

        Args:
            rates: by part, such as ``prefix=1e-2, lora=2e-3``.

        Raises:
            ConfigError: a part has no rate, or a rate no part.
        """
        modules: dict[str, nn.Module] = {"prefix": self.encoder, str(self.delta.method): self.delta}
        if rates.keys() != modules.keys():
            raise ConfigError(f"parameter_groups: expected a rate for {' and '.join(modules)}, got {', '.join(rates)}")
        return [{"params": list(modules[part].parameters()), "lr": rate} for part, rate in rates.items()]

    @contextmanager
    def disable_part(self, *parts: str) -> Iterator[None]:
        """Leave parts out for a while: ``"prefix"``, ``"lora"``, ...; for the other the text stays where it was.

        Raises:
            ConfigError: there is no such part.
        """
        known = ("prefix", str(self.delta.method))
        unknown = sorted(set(parts) - set(known))
        if unknown:
            raise ConfigError(f"disable_part: no part {unknown[0]} here, only {' and '.join(known)}")
        before = self._off
        self._put(before | set(parts), is_in=self._is_in)
        try:
            yield
        finally:
            self._put(before, is_in=self._is_in)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Be the base model for a while."""
        with self._detached():
            yield

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the artefact.

        Raises:
            ArtefactError: the folder cannot be written to.
        """
        self.prefix.save(folder)

    def unload(self) -> PreTrainedModel:
        """Take both parts out and return the base model as it was, but for its parameters' `requires_grad`."""
        self._put(self._off, is_in=False)
        return self.base_model

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """Return what is trained, by part: a Trainer's checkpoints hold no base model."""
        where: str = options.pop("prefix", "")
        state = self.encoder.state_dict(*args, prefix=f"{where}encoder.", **options)
        state |= {f"{where}delta.{name}": number.detach() for name, number in self.delta.named().items()}
        state[where + POSITION] = torch.tensor(self.encoder.text_position(self._position))
        with self._detached():
            state[where + FINGERPRINT] = as_fingerprint(self.base_model)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave, the text's position too.

        Raises:
            BaseMismatchError: it was trained on another base model.
        """

        def behind(name: str) -> dict[str, Tensor]:
            return {key.removeprefix(name): value for key, value in state_dict.items() if key.startswith(name)}

        with self._detached():
            check_fingerprint(self.base_model, state_dict.get(FINGERPRINT))
            if POSITION in state_dict:
                self._position = int(state_dict[POSITION])
        self.delta.load(behind("delta."))
        return self.encoder.load_state_dict(behind("encoder."), strict=strict)

    def _put(self, off: frozenset[str], *, is_in: bool) -> None:
        """Let the base model read the parts that are not off, or, out of it, none."""
        if self._handle is not None:
            self._handle.detach()
        self._handle, self._off, self._is_in = None, off, is_in
        deltas = () if self.delta.method in off else (self.delta,)
        encoder = None if "prefix" in off else self.encoder
        if is_in and (encoder is not None or deltas):
            self._handle = attach(self.base_model, encoder, position_offset=self._position, deltas=deltas)

    @contextmanager
    def _detached(self) -> Iterator[None]:
        was_in = self._is_in
        self._put(self._off, is_in=False)
        try:
            yield
        finally:
            self._put(self._off, is_in=was_in)


def make_hybrid(
    model: PreTrainedModel,
    configs: Sequence[Any],
    *,
    revision: str | None,
    init_token_ids: Sequence[int] | Tensor | None,
) -> HybridModel:
    """Freeze a base model and give it a new prefix and another method's layers to train.

    Args:
        model: the base model, with nothing attached.
        configs: a `PrefixTuningConfig` of prefixkit's, and a `LoraConfig` or `IA3Config` of PEFT's, in either order.
        revision: of the base model, kept in what is saved.
        init_token_ids: as for `get_peft_model`.

    Raises:
        ConfigError: the configurations are not these two, or one asks for what is not done here.
        UnsupportedModelError: the model cannot take one of them.
    """
    from peft import IA3Config, LoraConfig

    own = [config for config in configs if isinstance(config, PrefixTuningConfig)]
    others = [config for config in configs if type(config) in (LoraConfig, IA3Config)]
    if len(configs) != 2 or len(own) != 1 or len(others) != 1:
        found = ", ".join(type(config).__name__ for config in configs) or "nothing"
        raise ConfigError(
            f"peft_config: a hybrid is prefixkit's PrefixTuningConfig and PEFT's LoraConfig or IA3Config, got {found}; "
            "other hybrids: prefixkit train method=prefix+<method>"
        )
    method = method_of(others[0])
    seed = int(torch.randint(2**62, ()))  # from torch's global generator, as PEFT draws
    delta = build_delta(model, method, torch.Generator().manual_seed(seed))
    encoder = new_encoder(model, own[0], init_token_ids)
    name = own[0].base_model_name_or_path
    return HybridModel(model, encoder, delta, base_id=name, revision=revision or own[0].revision)


def method_of(config: "LoraConfig | IA3Config") -> MethodConfig:
    """Return a configuration of PEFT's in our words.

    Raises:
        ConfigError: it asks for something else than the plain method.
    """
    from peft import LoraConfig

    read = _READ if isinstance(config, LoraConfig) else set()
    plain = type(config)()
    for name in (field.name for field in fields(config)):
        given = getattr(config, name)
        is_nothing = given is None or (isinstance(given, list | dict | set) and not given)
        if name not in _IGNORED | read and not is_nothing and given != getattr(plain, name):
            raise ConfigError(
                f"peft_config: {type(config).__name__}.{name}={given!r} is not done in a hybrid; leave it out"
            )
    if not isinstance(config, LoraConfig):
        return MethodConfig(kind=Method.IA3, beside_prefix=True)
    targets = config.target_modules
    if config.r < 1 or config.lora_alpha <= 0:
        raise ConfigError("peft_config: r and lora_alpha: expected more than 0")
    if isinstance(targets, str):
        raise ConfigError(f"peft_config: target_modules={targets!r}: give a list of names, not a pattern")
    return MethodConfig(
        kind=Method.LORA,
        beside_prefix=True,
        rank=config.r,
        alpha=float(config.lora_alpha),
        dropout=config.lora_dropout,
        targets=None if targets is None else sorted(targets),
    )
