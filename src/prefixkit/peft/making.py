"""PEFT's `get_peft_model` for prefix tuning."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.errors import ConfigError, UnsupportedModelError
from prefixkit.models.adapters import has_adapters
from prefixkit.peft.arguments import MAKING, check_others
from prefixkit.peft.config import require_own
from prefixkit.peft.hybrid import HybridModel, make_hybrid
from prefixkit.peft.lookup import one_prefix
from prefixkit.peft.model import PeftModel
from prefixkit.peft.start import new_encoder


def get_peft_model(
    model: PreTrainedModel,
    peft_config: Any,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    init_token_ids: Sequence[int] | Tensor | None = None,
) -> PeftModel | HybridModel:
    """Freeze a base model and give it a new prefix to train.

    Args:
        model: a decoder-only or encoder-decoder transformers model with nothing attached.
        peft_config: what to train, a `PrefixTuningConfig` of prefixkit's; or a list of one and a `LoraConfig` or
            `IA3Config` of PEFT's, for a hybrid of both.
        adapter_name: only ``"default"``.
        mixed: only False.
        autocast_adapter_dtype: changes nothing: a prefix is trained in float32.
        revision: of the base model, kept in what is saved.
        low_cpu_mem_usage: changes nothing.
        init_token_ids: tokens whose keys and values the prefix starts from, such as those of an instruction; random
            words if left out. Where a prefix starts decides most of how well it learns.

    Raises:
        UnsupportedModelError: the model cannot take a prefix, or holds adapters already.
        ConfigError: the configuration does not fit the model.
    """
    if adapter_name != "default":
        raise ConfigError(one_prefix(adapter_name))
    others = {"mixed": mixed, "autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
    check_others("get_peft_model", others, MAKING)
    if has_adapters(model):
        raise UnsupportedModelError(
            f"{type(model).__name__}: holds adapters, which save_pretrained here would leave out; "
            "train a PrefixEncoder beside them with prefixkit.attach"
        )
    if isinstance(peft_config, list | tuple):
        return make_hybrid(model, peft_config, revision=revision, init_token_ids=init_token_ids)
    config = require_own(peft_config, "peft_config")
    encoder = new_encoder(model, config, init_token_ids)
    config.revision = revision or config.revision
    return PeftModel(model, encoder, config)
