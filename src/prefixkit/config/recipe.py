"""The recipe: everything a run depends on, in one typed object."""

from typing import Annotated

from pydantic import StringConstraints

from prefixkit.config.data import DataConfig
from prefixkit.config.evaluation import EvaluationConfig
from prefixkit.config.generation import GenerationConfig
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
    data: DataConfig = DataConfig()
    """What it is trained on."""
    train: TrainConfig = TrainConfig()
    """How it is trained."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How it is measured."""
    generation: GenerationConfig = GenerationConfig()
    """How text is sampled, in evaluation and by `prefixkit generate`."""
