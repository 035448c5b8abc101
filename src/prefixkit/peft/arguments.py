"""Arguments PEFT has and a prefix here has no use for: taken where they change nothing, refused where they would."""

from collections.abc import Mapping, Sequence
from typing import Any

from prefixkit.errors import ConfigError, did_you_mean

#: For each argument the values that mean nothing here, and what to do instead of the others.
Meaningless = Mapping[str, tuple[tuple[Any, ...], str]]

_ON_DISK = "folders are read from disk; download it first (hf download NAME --local-dir FOLDER)"
_OF_HUB: Meaningless = {
    "revision": ((None,), _ON_DISK),
    "token": ((None,), _ON_DISK),
    "use_auth_token": ((None,), _ON_DISK),
    "cache_dir": ((None,), _ON_DISK),
    "force_download": ((None, False), _ON_DISK),
    "local_files_only": ((None, True, False), _ON_DISK),
    "subfolder": ((None, ""), "give the folder in it"),
}
TUNING: Meaningless = {
    "peft_type": ((None, "PREFIX_TUNING"), "only PREFIX_TUNING is here"),
    "inference_mode": ((None, False), "a new prefix is there to be trained; load a trained one with from_pretrained"),
    "num_transformer_submodules": ((None, 1), "a decoder-only model has one stack; leave it out"),
    "modules_to_save": ((None, []), "the base model stays frozen; train its modules outside of prefixkit"),
    "auto_mapping": ((None,), "PEFT fills it in itself; leave it out"),
}
MAKING: Meaningless = {
    "mixed": ((False,), "one model holds one prefix here; a LoRA may stand beside it, see the page on PEFT"),
    "autocast_adapter_dtype": ((True, False), "a prefix is trained in float32"),
    "low_cpu_mem_usage": ((True, False), "a prefix is small; leave it out"),
}
LOADING: Meaningless = {
    **_OF_HUB,
    "autocast_adapter_dtype": ((True, False), "it turns a format for trained numbers on or off; leave it out"),
    "low_cpu_mem_usage": ((True, False), "a prefix is small; leave it out"),
    "ephemeral_gpu_offload": ((False,), "a prefix is where the model is; leave it out"),
    "key_mapping": ((None,), "files of prefixes have one layout; leave it out"),
    "torch_device": ((None,), "a prefix is where the model is; leave it out"),
    "device_map": ((None,), "a prefix is where the model is; leave it out"),
    "use_safetensors": ((None, True), "nothing else is read"),
}
SAVING: Meaningless = {
    "push_to_hub": ((None, False), "upload the folder (hf upload NAME FOLDER)"),
    "safe_serialization": ((True,), "would write a pickle; leave it out"),
    "selected_adapters": ((None, ["default"], ("default",)), "one model holds one prefix here, default; leave it out"),
    "save_embedding_layers": (("auto", False), "the base model is frozen; save it by itself"),
    "path_initial_model_for_weight_conversion": ((None,), "it is for LoRA; leave it out"),
}


def check_others(
    caller: str,
    others: Mapping[str, Any],
    meaningless: Meaningless,
    known: Sequence[str] = (),
) -> None:
    """Refuse arguments PEFT does not have, and values of those it has that would change something there.

    Args:
        caller: whose arguments they are.
        others: name and value of each.
        meaningless: for each of PEFT's, the values that mean nothing here, and what to do instead of the others.
        known: further names, for suggestions.

    Raises:
        ConfigError: there is such an argument.
    """
    for key, value in others.items():
        if key not in meaningless:
            hint = did_you_mean(key, [*known, *meaningless]) or "; leave it out"
            raise ConfigError(f"{caller}: {key}: unknown{hint}")
        harmless, todo = meaningless[key]
        if getattr(value, "value", value) not in harmless:
            raise ConfigError(f"{caller}: {key}={value!r}: {todo}")
