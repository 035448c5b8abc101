"""prefixkit: prefix tuning for frozen language models.

    base = pk.load_base_model("smollm2-135m")
    prefix = pk.Prefix.load("runs/positive-reviews")
    with pk.attach(base.model, prefix):
        base.model.generate(...)

Names are imported when first used, so that `import prefixkit` alone loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefixkit.classification import classify as classify
    from prefixkit.classification import tag as tag
    from prefixkit.config import GenerationConfig as GenerationConfig
    from prefixkit.config import Recipe as Recipe
    from prefixkit.config import load_recipe as load_recipe
    from prefixkit.errors import PrefixkitError as PrefixkitError
    from prefixkit.evaluation import heldout_loss as heldout_loss
    from prefixkit.generation import generate_texts as generate_texts
    from prefixkit.injection.attach import Handle as Handle
    from prefixkit.injection.attach import attach as attach
    from prefixkit.lab.diagnosis.run import diagnose_run as diagnose_run
    from prefixkit.lab.doctor import examine as examine
    from prefixkit.lab.run.loaded_run import LoadedRun as LoadedRun
    from prefixkit.lab.run.loaded_run import load_run as load_run
    from prefixkit.lab.run.run import Run as Run
    from prefixkit.lab.run.run import evaluate_run as evaluate_run
    from prefixkit.lab.run.run import train_run as train_run
    from prefixkit.models import Base as Base
    from prefixkit.models import load_base_model as load_base_model
    from prefixkit.models.inspect import inspect_model as inspect_model
    from prefixkit.models.text_states import text_states as text_states
    from prefixkit.peft import PeftModel as PeftModel
    from prefixkit.peft import PrefixTuningConfig as PrefixTuningConfig
    from prefixkit.peft import get_peft_model as get_peft_model
    from prefixkit.prefix import Prefix as Prefix
    from prefixkit.prefix import PrefixEncoder as PrefixEncoder
    from prefixkit.prefix import PrefixStates as PrefixStates

__version__ = "0.1.0"

_HOMES = {
    "Base": "models",
    "GenerationConfig": "config",
    "Handle": "injection",
    "LoadedRun": "lab.run.loaded_run",
    "PeftModel": "peft",
    "Prefix": "prefix",
    "PrefixEncoder": "prefix",
    "PrefixStates": "prefix",
    "PrefixTuningConfig": "peft",
    "PrefixkitError": "errors",
    "Recipe": "config",
    "Run": "lab.run.run",
    "attach": "injection",
    "classify": "classification",
    "diagnose_run": "lab.diagnosis.run",
    "evaluate_run": "lab.run.run",
    "examine": "lab.doctor",
    "generate_texts": "generation",
    "get_peft_model": "peft",
    "heldout_loss": "evaluation",
    "inspect_model": "models.inspect",
    "load_base_model": "models",
    "load_recipe": "config",
    "load_run": "lab.run.loaded_run",
    "tag": "classification",
    "text_states": "models.text_states",
    "train_run": "lab.run.run",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prefixkit' has no attribute {name!r}")
    return getattr(import_module(f"prefixkit.{_HOMES[name]}"), name)
