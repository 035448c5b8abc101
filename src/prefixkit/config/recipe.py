"""The recipe: everything a run depends on, in one typed object."""

from typing import Annotated

from pydantic import StringConstraints, model_validator

from prefixkit.config.data import DataConfig, Format
from prefixkit.config.evaluation import EvaluationConfig
from prefixkit.config.generation import GenerationConfig
from prefixkit.config.head import HeadConfig, Pooling
from prefixkit.config.method import Method, MethodConfig
from prefixkit.config.model import ModelConfig
from prefixkit.config.prefix import PrefixConfig
from prefixkit.config.section import Section
from prefixkit.config.train import TrainConfig

RunName = Annotated[str, StringConstraints(pattern=r"^[^/\\]*[^/\\.][^/\\]*$", min_length=1, max_length=120)]


class Recipe(Section):
    """A run, written down. A recipe file holds only what differs from these defaults."""

    name: RunName = "run"
    """Name of the run and of its folder under runs/."""
    description: str = ""
    """One line on what the prefix is for."""
    licence: str = ""
    """Terms of the base model and the data, kept in the artefact."""
    model: ModelConfig = ModelConfig()
    """The frozen base model."""
    prefix: PrefixConfig = PrefixConfig()
    """What is trained."""
    method: MethodConfig = MethodConfig()
    """Another method in its place, or beside it."""
    head: HeadConfig = HeadConfig()
    """What is trained beside it, for data formats classes and tags."""
    data: DataConfig = DataConfig()
    """What it is trained on."""
    train: TrainConfig = TrainConfig()
    """How it is trained."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How it is measured."""
    generation: GenerationConfig = GenerationConfig()
    """How text is sampled, in evaluation and by `prefixkit generate`."""

    @model_validator(mode="after")
    def _words_are_not_pooled(self) -> "Recipe":
        if self.data.format is Format.TAGS and self.head.pooling is Pooling.MEAN:
            raise ValueError("head.pooling mean is for whole texts (data.format classes); words have their own token")
        if self.head.pooling is Pooling.LAST:
            raise ValueError("head.pooling last is what heads imported from PEFT read; to train one set token or mean")
        return self

    @model_validator(mode="after")
    def _method_can_be_had(self) -> "Recipe":
        method, prefix = self.method.kind, self.prefix
        if method.is_prompt:
            for name in ("layers", "layer_lengths", "placement", "gate"):
                if getattr(prefix, name):
                    raise ValueError(f"prefix.{name}: virtual tokens of {method} stand in every layer; leave it out")
        if method is Method.INFIX and self.data.format.is_classified:
            raise ValueError("method: an infix stands between input and target, and labels have no target to write")
        if method is Method.INFIX and self.data.format is Format.TEXT and not self.data.prompt:
            raise ValueError("data.prompt: an infix stands behind an input, and whole texts have none; write a prompt")
        if method is not Method.PREFIX and self.model.shard:
            raise ValueError(f"model.shard: {method} cannot be trained in a sharded base model yet; set it to false")
        return self

    @model_validator(mode="after")
    def _tokens_are_written(self) -> "Recipe":
        if self.evaluation.latency_tokens and self.data.format.is_classified:
            raise ValueError("evaluation.latency_tokens: where labels are learned no token is written; leave it out")
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> "Recipe":
        method = self.method
        if self.data.format.is_classified:
            return self  # there is the head
        has_still_prefix = not method.has_prefix or self.train.learning_rate == 0
        is_alone = method.has_prefix and not method.beside_prefix
        if has_still_prefix and (is_alone or method.learning_rate == 0):
            which = "train.learning_rate" if method.has_prefix else "method.learning_rate"
            which = "train.learning_rate and method.learning_rate" if method.beside_prefix else which
            raise ValueError(f"{which}: 0, so nothing would be trained")
        return self
