"""What a `PeftModel` gives of its base model under the base model's own names.

The base model reads nothing between calls, so that a method of its own that runs it would run it without the
prefix. Which methods do cannot be told by looking, and transformers adds new ones; so the rule is the other way round.
What only holds data is given; of methods and parts, those alone that are known not to run the layers.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

_ONE_PREFIX = "one model holds one prefix here; attach(base, [a, b]) gives each row of a batch its own"
_BATCHING = "continuous batching reads no prefix; call generate"
#: What there is another way for.
_ELSEWHERE = {
    "add_adapter": _ONE_PREFIX,
    "load_adapter": _ONE_PREFIX,
    "delete_adapter": _ONE_PREFIX,
    "merge_adapter": "a prefix cannot be merged into weights",
    "merge_and_unload": "a prefix cannot be merged into weights",
    "prompt_encoder": "what is trained is `encoder`",
    "get_prompt": "the keys and values are `prefix.states`; attach(base, prefix) lets a model read them",
    "get_prompt_embedding_to_save": "they are `prefix.states`; save_pretrained writes them",
    "modules_to_save": "the base model stays frozen; train its modules outside of prefixkit",
    "push_to_hub": "save_pretrained writes a folder; upload it with huggingface_hub.upload_folder",
    "generate_batch": _BATCHING,
    "init_continuous_batching": _BATCHING,
    "continuous_batching_context_manager": _BATCHING,
}
#: Methods of transformers' models that look, count or set, and never run a layer that reads a prefix.
_RUN_NOTHING = frozenset({
    "add_model_tags", "can_generate", "compute_transition_scores",
    "disable_input_require_grads", "enable_input_require_grads", "get_input_embeddings", "get_memory_footprint",
    "get_output_embeddings", "loss_function", "num_parameters",
    "prepare_decoder_input_ids_from_labels", "resize_token_embeddings", "set_attn_implementation",
    "set_input_embeddings", "set_output_embeddings", "tie_weights", "warn_if_padding_and_no_attention_mask",
})  # fmt: skip


def one_prefix(adapter_name: str) -> str:
    """Return why there is no adapter of this name."""
    return f'adapter_name: expected "default", got {adapter_name!r}; {_ONE_PREFIX}'


def look_up(base: PreTrainedModel, name: str) -> Any:
    """Return an attribute of the base model.

    Raises:
        AttributeError: it has none of that name, or one that could run it without the prefix.
    """
    if name in _ELSEWHERE:
        raise AttributeError(f"prefixkit's PeftModel has no {name}: {_ELSEWHERE[name]}")
    value = getattr(base, name)
    if name in _RUN_NOTHING or not _could_run(value):
        return value
    raise AttributeError(
        f"prefixkit's PeftModel has no {name}: called on the base model it could leave the prefix out; call "
        f"get_base_model().{name} inside attach(get_base_model(), model.prefix), or by itself if that is meant"
    )


def _could_run(value: Any) -> bool:
    """Whether calling this could run attention layers: not a class, nor a module without parts (an embedding)."""
    if isinstance(value, nn.Module):
        return any(True for _ in value.children())
    return callable(value) and not isinstance(value, type)
