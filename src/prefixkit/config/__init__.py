"""The typed recipe: one strict model per part, unknown keys are errors, field texts are the help."""

from prefixkit.config.data import DataConfig, Format, SplitConfig
from prefixkit.config.evaluation import EvaluationConfig, Metric
from prefixkit.config.generation import GenerationConfig
from prefixkit.config.head import HeadConfig, Pooling
from prefixkit.config.loading import (
    dump_recipe,
    load_recipe,
    parse_recipe,
    recipe_names,
    recipe_text,
    validate_recipe,
)
from prefixkit.config.method import AdapterStyle, Biases, Method, MethodConfig
from prefixkit.config.model import Attention, Dtype, ModelConfig
from prefixkit.config.prefix import Activation, InitConfig, InitKind, Placement, PrefixConfig
from prefixkit.config.recipe import Recipe
from prefixkit.config.study import ArmConfig, ClaimConfig, ClaimedTable, ClaimTest, Size, StudyConfig
from prefixkit.config.study_loading import arm_recipe, as_overrides, load_study, size_settings, study_names, study_text
from prefixkit.config.train import DivergenceConfig, OnDivergence, Schedule, TrainConfig

__all__ = [
    "Activation",
    "AdapterStyle",
    "ArmConfig",
    "Attention",
    "Biases",
    "ClaimConfig",
    "ClaimTest",
    "ClaimedTable",
    "DataConfig",
    "DivergenceConfig",
    "Dtype",
    "EvaluationConfig",
    "Format",
    "GenerationConfig",
    "HeadConfig",
    "InitConfig",
    "InitKind",
    "Method",
    "MethodConfig",
    "Metric",
    "ModelConfig",
    "OnDivergence",
    "Placement",
    "Pooling",
    "PrefixConfig",
    "Recipe",
    "Schedule",
    "Size",
    "SplitConfig",
    "StudyConfig",
    "TrainConfig",
    "arm_recipe",
    "as_overrides",
    "dump_recipe",
    "load_recipe",
    "load_study",
    "parse_recipe",
    "recipe_names",
    "recipe_text",
    "size_settings",
    "study_names",
    "study_text",
    "validate_recipe",
]
