"""PEFT's names for prefix tuning, on prefixkit: change the import of a script, and it runs.

    from prefixkit.peft import PeftModel, PrefixTuningConfig, TaskType, get_peft_model

peft itself is not needed. docs/from-peft.md shows both sides and says where they differ.
"""

from typing import Any

from prefixkit.peft.config import PrefixTuningConfig, TaskType
from prefixkit.peft.model import PeftModel, get_peft_model

PeftConfig = PrefixTuningConfig

__all__ = ["PeftConfig", "PeftModel", "PrefixTuningConfig", "TaskType", "get_peft_model"]


def __getattr__(name: str) -> Any:
    if name.startswith("AutoPeftModel"):
        hint = "load the base model with transformers, then PeftModel.from_pretrained(base, folder)"
    elif name.endswith("Config"):
        hint = f"only prefix tuning is here; import {name} from peft, its adapters work beside an attached prefix"
    else:
        raise AttributeError(f"module 'prefixkit.peft' has no attribute {name!r}")
    raise ImportError(f"prefixkit.peft has no {name}: {hint}")
