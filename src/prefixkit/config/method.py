"""Settings of the method: what is trained in or beside the frozen base model."""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, model_validator

from prefixkit.config.section import Section


class Method(StrEnum):
    """A way to adapt a frozen model."""

    PREFIX = "prefix"
    INFIX = "infix"
    EMBEDDING = "embedding"
    PROMPT_TUNING = "prompt-tuning"
    P_TUNING = "p-tuning"
    LORA = "lora"
    IA3 = "ia3"
    BITFIT = "bitfit"
    ADAPTER = "adapter"
    FULL = "full"
    TOP_LAYERS = "top-layers"

    @property
    def is_prompt(self) -> bool:
        """Whether embeddings before the text are trained, which the model itself turns into keys and values."""
        return self in (Method.EMBEDDING, Method.PROMPT_TUNING, Method.P_TUNING)

    @property
    def is_delta(self) -> bool:
        """Whether the model's layers are changed, so that it can stand beside a prefix."""
        return self not in (Method.PREFIX, Method.INFIX) and not self.is_prompt


class AdapterStyle(StrEnum):
    """Where bottleneck adapters stand."""

    HOULSBY = "houlsby"
    PFEIFFER = "pfeiffer"
    PARALLEL = "parallel"


class Biases(StrEnum):
    """Which biases BitFit trains."""

    AUTO = "auto"
    OWN = "own"
    ADDED = "added"


#: What a method may be called in one word, beside the names of `Method` and ``prefix+<name>``.
_MIX_AND_MATCH = {"kind": "adapter", "style": "parallel", "beside_prefix": True}
_WORDS: dict[str, dict[str, Any]] = {"mam": _MIX_AND_MATCH, "mix-and-match": _MIX_AND_MATCH}

#: Which methods read a setting.
_READERS = {
    "rank": {Method.LORA},
    "alpha": {Method.LORA},
    "dropout": {Method.LORA},
    "targets": {Method.LORA},
    "style": {Method.ADAPTER},
    "bottleneck": {Method.ADAPTER},
    "scale": {Method.ADAPTER},
    "biases": {Method.BITFIT},
    "top_layers": {Method.TOP_LAYERS},
}


_TITLES = {
    Method.EMBEDDING: "embedding-only", Method.PROMPT_TUNING: "prompt tuning", Method.P_TUNING: "P-tuning",
    Method.LORA: "LoRA", Method.IA3: "IA3", Method.BITFIT: "BitFit", Method.FULL: "full fine-tuning",
    Method.TOP_LAYERS: "top layers",
}  # fmt: skip


class MethodConfig(Section):
    """Another method than the prefix, or one beside it.

    In one word: `method=lora`, `method=prefix+lora`, or `method=mam` (the Mix-and-Match adapter: a prefix, and adapters
    of style parallel).
    """

    kind: Method = Field(Method.PREFIX, strict=False)
    """prefix: keys and values in every attention layer, as the section prefix says; infix: the same between
    input and target, seen by the target alone; embedding: virtual tokens'
    embeddings alone, through the prefix's own MLP; prompt-tuning and p-tuning: PEFT's; lora and ia3: PEFT's; bitfit:
    bias terms; adapter: bottleneck adapters; full: all weights; top-layers: those of the last layers."""
    beside_prefix: bool = False
    """Train a prefix too, as the section prefix says: a hybrid, saved and attached as one artefact."""
    learning_rate: float | None = Field(None, ge=0)
    """Peak rate of AdamW for this method's own numbers; left out, the method's own default. The prefix beside it goes
    by train.learning_rate. 0 leaves the numbers as they are."""
    start: str | None = None
    """The run or artefact folder whose numbers of this method to start from; left out, the method's own start, which
    leaves the base model as it is."""
    rank: int = Field(8, ge=1)
    """For lora: rank of each update."""
    alpha: float | None = Field(None, gt=0)
    """For lora: the update is scaled by alpha / rank; left out, twice the rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """For lora: share of a layer's input set to zero while training, on the way through the update."""
    targets: list[str] | None = Field(None, min_length=1)
    """For lora: ends of the names of the layers to change, such as q_proj; left out, PEFT's for the kind of model."""
    style: AdapterStyle = Field(AdapterStyle.PFEIFFER, strict=False)
    """For adapter. houlsby: after attention and after the feed-forward network of each layer; pfeiffer: after the
    latter alone; parallel: beside the latter."""
    bottleneck: int = Field(16, ge=1)
    """For adapter: width of its hidden layer."""
    scale: float | None = Field(None, gt=0)
    """For adapter: its output is scaled by this; left out, 4 for parallel (He et al., 2022) and 1 otherwise."""
    biases: Biases = Field(Biases.AUTO, strict=False)
    """For bitfit. own: those the model has; added: one on every linear layer, from 0, for models without; auto: its own
    if it has any."""
    top_layers: Annotated[int, Field(ge=1)] = 2
    """For top-layers: how many of the last layers are trained."""

    @property
    def title(self) -> str:
        """What to call it in a report: ``LoRA``, ``prefix + LoRA``."""
        own = _TITLES.get(self.kind, str(self.kind))
        return f"prefix + {own}" if self.beside_prefix else own

    @property
    def settings(self) -> dict[str, Any]:
        """The settings this method reads, by name: what it is made from."""
        return {name: getattr(self, name) for name, readers in _READERS.items() if self.kind in readers}

    @property
    def has_prefix(self) -> bool:
        """Whether keys and values are trained."""
        return self.kind in (Method.PREFIX, Method.INFIX) or self.beside_prefix

    def refusal(self, setting: str) -> str | None:
        """Say why a setting of another section, such as ``prefix.gate``, would change nothing; None if it would."""
        section, _, name = setting.partition(".")
        if setting == "train.learning_rate" and not self.has_prefix:
            return f"does not reach {self.kind}, whose rate is method.learning_rate"
        if section != "prefix" or self.has_prefix:
            return None
        if not self.kind.is_prompt:
            return f"no prefix is trained with method {self.kind}; for both, method=prefix+{self.kind}"
        is_unread = name.startswith(("reparam_", "dropout")) and self.kind is not Method.EMBEDDING
        if is_unread or (name.startswith("init") and self.kind is Method.P_TUNING):
            return f"{self.kind} does not read it; leave it out"
        return None

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, values: Any) -> Any:
        return cls.from_word(values) if isinstance(values, str) else values

    @staticmethod
    def from_word(word: str) -> dict[str, Any]:
        """Return the settings a word stands for, such as ``lora``, ``prefix+lora`` or ``mam``."""
        if word in _WORDS:
            return dict(_WORDS[word])
        first, plus, second = word.partition("+")
        if not plus:
            return {"kind": word}
        kinds = [each.strip() for each in (first, second)]
        other = kinds[1] if kinds[0] == Method.PREFIX else kinds[0]
        if Method.PREFIX not in kinds or other == Method.PREFIX or "+" in second:
            raise ValueError(f"{word!r}: a hybrid is prefix+<one other method>, such as prefix+lora")
        return {"kind": other, "beside_prefix": True}

    @model_validator(mode="after")
    def _is_read(self) -> "MethodConfig":
        if self.beside_prefix and not self.kind.is_delta:
            raise ValueError(
                f"beside_prefix: {self.kind} stands where a prefix stands; take a method that changes layers"
            )
        is_alone = self.has_prefix and not self.beside_prefix
        if is_alone and self.learning_rate is not None:
            raise ValueError(f"learning_rate: that of a {self.kind} is train.learning_rate")
        if is_alone and self.start is not None:
            raise ValueError(
                f"start: a {self.kind} starts from another by prefix.init.kind=prefix, prefix.init.path=FOLDER"
            )
        if self.kind.is_prompt and self.start is not None:
            raise ValueError(f"start: a saved prefix holds no embeddings for {self.kind} to start from; leave it out")
        for name, readers in _READERS.items():
            if self.kind not in readers and getattr(self, name) != MethodConfig.model_fields[name].get_default():
                raise ValueError(
                    f"{name}: is a setting of {' and '.join(sorted(readers))}, and the method is {self.kind}"
                )
        return self
