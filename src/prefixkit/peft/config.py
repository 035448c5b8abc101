"""PEFT's `PrefixTuningConfig`: the same arguments, checked, and what they mean as prefixkit's settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefixkit.config import Activation, InitConfig, InitKind, Placement, PrefixConfig
from prefixkit.errors import ArtefactError, ConfigError, did_you_mean
from prefixkit.export.adapter import CONFIG_NAME, TaskType, read_adapter
from prefixkit.peft.arguments import TUNING, check_others
from prefixkit.prefix import PREFIX_FILES, Geometry, Prefix

#: PEFT's projection as our reparameterisation: one hidden layer (tanh) and the last one.
PROJECTION_DEPTH = 2
#: What transformers' Trainer calls the parameters of a model it does not know.
TRAINERS = "model.safetensors"
#: The attention stacks that get a prefix where nothing is said: in an encoder-decoder PEFT's choice, not the paper's.
DEFAULT_PLACEMENT = (Placement.DECODER_SELF,)
#: Tasks prefix tuning is offered for under PEFT's names.
_OFFERED = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
NOT_OFFERED = "PEFT's names are offered for decoder-only models and encoder-decoders; use prefixkit.attach"


class PrefixTuningConfig:
    """What to train, in PEFT's words.

    Args:
        task_type: ``"CAUSAL_LM"`` for decoder-only models, ``"SEQ_2_SEQ_LM"`` for encoder-decoders; or PEFT's own or
            our `TaskType` of that name.
        num_virtual_tokens: length of the prefix.
        prefix_projection: train through a two-layer tanh MLP, which is folded away when the prefix is saved.
        encoder_hidden_size: width of that MLP; left out, as wide as a layer's key (PEFT's choice), or as the prefix is
            long if that is more (a narrower one could not start from words).
        init_weights: None starts from the model's own keys and values of random words (or of ``init_token_ids``, see
            `get_peft_model`), ``"random"`` from PEFT's random numbers, ``"zero"`` from zeros as PEFT does.
        token_dim: numbers in a layer's key; checked against the model. PEFT calls for it, prefixkit asks the model.
        num_layers: likewise.
        num_attention_heads: likewise; the KV heads.
        base_model_name_or_path: name of the base model, kept in what is saved; left out, the model's own.
        revision: of the base model.
        placement: not an argument of PEFT's: the attention stacks of an encoder-decoder that get a prefix. Left out,
            the decoder's self-attention, as in PEFT; the paper's are
            ``["encoder_self", "decoder_self", "cross"]``.
        others: PEFT's remaining arguments, at values that change nothing.

    Raises:
        ConfigError: an argument is unknown, out of range, or asks for what a prefix cannot do.
    """

    def __init__(
        self,
        *,
        task_type: str | None = None,
        num_virtual_tokens: int | None = 20,
        prefix_projection: bool = False,
        encoder_hidden_size: int | None = None,
        init_weights: str | None = None,
        token_dim: int | None = None,
        num_layers: int | None = None,
        num_attention_heads: int | None = None,
        base_model_name_or_path: str | None = None,
        revision: str | None = None,
        placement: Sequence[str] | None = None,
        **others: Any,
    ) -> None:
        self.task_type = _task(task_type)
        self.num_virtual_tokens = _size("num_virtual_tokens", num_virtual_tokens, most=4096)
        self.prefix_projection = prefix_projection
        self.encoder_hidden_size = encoder_hidden_size
        self.init_weights = init_weights
        self.token_dim = token_dim
        self.num_layers = num_layers
        self.num_attention_heads = num_attention_heads
        self.base_model_name_or_path = base_model_name_or_path
        self.revision = revision
        self.placement = _placement(placement, self.task_type)
        for key in ("encoder_hidden_size", "token_dim", "num_layers", "num_attention_heads"):
            if getattr(self, key) is not None:
                _size(key, getattr(self, key))
        if encoder_hidden_size is not None and not prefix_projection:
            raise ConfigError(
                "encoder_hidden_size: has no effect without prefix_projection=True; set it, or leave it out"
            )
        if init_weights not in (None, "zero", "random"):
            raise ConfigError(f'init_weights: expected None, "zero" or "random", got {init_weights!r}')
        others.pop("peft_version", None)
        if others.get("num_transformer_submodules") == 2 and self.task_type is TaskType.SEQ_2_SEQ_LM:
            del others["num_transformer_submodules"]
        check_others("PrefixTuningConfig", others, TUNING, known=tuple(vars(self)))

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method; there is one here."""
        return "PREFIX_TUNING"

    def to_dict(self) -> dict[str, Any]:
        """Return every setting by its name, the method among them."""
        return {"peft_type": self.peft_type} | vars(self)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "PrefixTuningConfig":
        """Return the configuration of a saved prefix, most of all its ``base_model_name_or_path``.

        Raises:
            ArtefactError: the folder holds neither a PEFT checkpoint of a prefix nor an artefact, or a Trainer's.
        """
        folder = Path(folder)
        if (folder / CONFIG_NAME).is_file():
            saved = read_adapter(folder).config
            if saved.task.has_head:
                raise has_head(folder)
            tokens, base, revision = saved.num_virtual_tokens, saved.base_model, saved.revision
        elif (folder / TRAINERS).is_file() and not any((folder / name).is_file() for name in PREFIX_FILES):
            raise ArtefactError(
                f"{folder}: a Trainer's checkpoint does not name its base model; load it with "
                "PeftModel.from_pretrained(base, folder)"
            )
        else:
            prefix = Prefix.load(folder)
            return cls.of(prefix)
        return cls(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=tokens, base_model_name_or_path=base, revision=revision
        )

    @classmethod
    def of(cls, prefix: Prefix) -> "PrefixTuningConfig":
        """Return the configuration of a prefix.

        Raises:
            ArtefactError: it belongs to an encoder, or has no virtual tokens.
        """
        base, states = prefix.card.base, prefix.states
        if not states.num_virtual_tokens:
            held = ", ".join(str(delta.method) for delta in prefix.deltas) or "nothing that was trained"
            raise ArtefactError(
                f"the artefact of {base.id} holds {held} and no prefix; attach it with prefixkit.attach"
            )
        task = task_of(states.geometry)
        if task is None:
            raise ArtefactError(f"the prefix of {base.id} belongs to an encoder; {NOT_OFFERED}")
        used = zip(states.geometry.sites, states.lengths, strict=True)
        placement = tuple(dict.fromkeys(site.placement for site, length in used if length))
        return cls(
            task_type=task,
            num_virtual_tokens=states.num_virtual_tokens,
            base_model_name_or_path=base.id,
            revision=base.revision,
            placement=placement if task is TaskType.SEQ_2_SEQ_LM else None,
        )

    def require_same(self, saved: "PrefixTuningConfig") -> None:
        """Refuse to be taken for the configuration of a saved prefix that it is not.

        Raises:
            ConfigError: they differ in something both say.
        """
        for key in ("task_type", "num_virtual_tokens", "base_model_name_or_path", "revision", "placement"):
            said, found = getattr(self, key), getattr(saved, key)
            if key == "placement" and saved.task_type is TaskType.SEQ_2_SEQ_LM:
                said, found = (", ".join(sorted(places or DEFAULT_PLACEMENT)) for places in (said, found))
            if said != found and (said is not None or key == "task_type"):
                raise ConfigError(f"config: {key} is {said}, that of the saved prefix {found}; leave it out")

    def to_prefix_config(self, token_dim: int) -> PrefixConfig:
        """Return the same as prefixkit's settings.

        PEFT's projection is a table ``[p, token_dim]``, a layer to `encoder_hidden_size`, tanh, and a layer to all keys
        and values: reparameterisation depth 2, but for our table, which is as wide as the MLP.

        Args:
            token_dim: numbers in a layer's key, `g * d` of the base model.
        """
        kinds = {None: InitKind.WORDS, "zero": InitKind.ZERO, "random": InitKind.RANDOM}
        return PrefixConfig(
            num_virtual_tokens=self.num_virtual_tokens,
            reparam_depth=PROJECTION_DEPTH if self.prefix_projection else 0,
            reparam_width=self.encoder_hidden_size or max(token_dim, self.num_virtual_tokens),
            reparam_activation=Activation.TANH,
            init=InitConfig(kind=kinds[self.init_weights], std=1.0),
        )

    def __repr__(self) -> str:
        said = ", ".join(f"{key}={value!r}" for key, value in vars(self).items() if value is not None)
        return f"PrefixTuningConfig({said})"


def _task(task: str | None) -> TaskType:
    names = [each.value for each in TaskType]
    if task is None:
        raise ConfigError('task_type: missing; give task_type="CAUSAL_LM", or "SEQ_2_SEQ_LM" for an encoder-decoder')
    name = getattr(task, "value", task)  # PEFT's own enum is as good
    if name not in _OFFERED:
        todo = did_you_mean(str(name), names)
        if name in names:
            todo = "; a prefix with a head for labels is trained by `prefixkit train`, see data.format classes and tags"
        raise ConfigError(f"task_type: expected CAUSAL_LM or SEQ_2_SEQ_LM, got {name}{todo}")
    return TaskType(name)


def _placement(given: Sequence[str] | None, task: TaskType) -> tuple[Placement, ...] | None:
    if given is None:
        return None
    names = [each.value for each in Placement]
    if isinstance(given, str) or not given:
        raise ConfigError(f"placement: expected a list of {', '.join(names)}, got {given!r}")
    for name in given:
        if name not in names:
            raise ConfigError(
                f"placement: expected {', '.join(names)}, got {name}{did_you_mean(str(name), names) or ''}"
            )
    found = tuple(dict.fromkeys(Placement(name) for name in given))
    if task is TaskType.CAUSAL_LM and found != DEFAULT_PLACEMENT:
        raise ConfigError("placement: a decoder-only model has decoder_self attention alone; leave it out")
    return found


def task_of(geometry: Geometry) -> TaskType | None:
    """Return what a model of this geometry is trained for here; None for encoders."""
    if geometry.moves_text:
        return TaskType.CAUSAL_LM
    return TaskType.SEQ_2_SEQ_LM if Placement.DECODER_SELF in geometry.placements else None


def require_own(config: Any, name: str) -> PrefixTuningConfig:
    """Return a configuration of ours; refuse PEFT's own, of whatever method.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(config, PrefixTuningConfig):
        return config
    kind = type(config)
    raise ConfigError(
        f"{name}: expected prefixkit's PrefixTuningConfig, got {kind.__module__.partition('.')[0]}'s {kind.__name__}; "
        "import PrefixTuningConfig from prefixkit.peft"
    )


def has_head(folder: Path) -> ArtefactError:
    """Return the refusal of a prefix that was trained with a head."""
    return ArtefactError(
        f"{folder}: its prefix learned labels and has a head, which would be lost here; use prefixkit.attach, "
        "prefixkit.classify or prefixkit.tag (of PEFT's folders with what prefixkit.export.from_peft returns)"
    )


def _size(key: str, value: Any, *, most: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (most is not None and value > most):
        expected = "a number of at least 1" if most is None else f"1-{most}"
        raise ConfigError(f"{key}: expected {expected}, got {value!r}")
    return value
