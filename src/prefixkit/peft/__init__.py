"""PEFT's names for prefix tuning, on prefixkit: change the import of a script, and it runs.

    from prefixkit.peft import PeftModel, PrefixTuningConfig, TaskType, get_peft_model

For decoder-only models and encoder-decoders. peft itself is needed for hybrids alone (`[prefix_config, lora_config]`).
docs/from-peft.md shows both sides and says where they differ.
"""

from typing import Any

from prefixkit.export.adapter import TaskType
from prefixkit.peft.config import PrefixTuningConfig
from prefixkit.peft.hybrid import HybridModel
from prefixkit.peft.making import get_peft_model
from prefixkit.peft.model import PeftModel

PeftConfig = PrefixTuningConfig
PeftModelForCausalLM = PeftModelForSeq2SeqLM = PeftModel

__all__ = [
    "HybridModel", "PeftConfig", "PeftModel", "PeftModelForCausalLM", "PeftModelForSeq2SeqLM", "PrefixTuningConfig",
    "TaskType", "get_peft_model",
]  # fmt: skip

#: Names of PEFT's that have no counterpart here, and what to do instead.
_INSTEAD = {
    "PeftType": "there is prefix tuning alone",
    "get_peft_config": "call PrefixTuningConfig(...) with the same arguments",
    "get_peft_model_state_dict": "model.state_dict() holds the prefix's parameters alone",
    "set_peft_model_state_dict": "model.load_state_dict(...) takes what model.state_dict() gave",
    "prepare_model_for_kbit_training": "a quantised base model needs no preparation; leave the call out",
}


def __getattr__(name: str) -> Any:
    if name.startswith("AutoPeftModel"):
        hint = "load the base model with transformers, then PeftModel.from_pretrained(base, folder)"
    elif name.endswith("Config"):
        hint = f"only prefix tuning is here; import {name} from peft: a hybrid, or adapters beside an attached prefix"
    elif name in _INSTEAD:
        hint = _INSTEAD[name]
    else:
        raise AttributeError(f"module 'prefixkit.peft' has no attribute {name!r}")
    raise ImportError(f"prefixkit.peft has no {name}: {hint}")
