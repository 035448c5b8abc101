"""Which of a model's settings its fingerprint covers: all, except those that cannot change what its layers compute.

A setting nobody thought of therefore counts. Left out, beside what is listed here, is what has the value its
configuration class declares as default: a release of transformers that adds a setting leaves old models what they were.
"""

import json
from copy import copy
from dataclasses import MISSING, fields
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from prefixkit.compat import ATTENTION_SETTING, layer_overrides

#: Settings that cannot change what the layers compute from a text, by what they are for.
_WITHOUT_EFFECT = frozenset(
    {
        # names, and where the model comes from
        "architectures", "auto_map", "finetuning_task", "is_llama_config", "rope_interleaved", "task_specific_params",
        "tokenizer_class", "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version",
        # how the weights are stored; the fingerprint has seen them as they are
        "dtype", "quantization_config", "torch_dtype",
        # what is returned, and in what order it is computed
        "chunk_size_feed_forward", "gradient_checkpointing", "num_logits_to_keep", "output_attentions",
        "output_hidden_states", "output_router_logits", "reference_compile", "return_dict", "use_cache",
        # how configurations of mixed layers are read and written
        "allow_global_per_layer_attribute_access", "serialize_explicit_per_layer_config",
        # the first values of weights
        "embed_init_std", "embedding_initializer_range", "init_std", "initializer_cutoff_factor", "initializer_factor",
        "initializer_range", "initializer_std",
        # dropout; not `moe_token_dropout` and `token_dropout`, which scale a text outside training too
        "activation_dropout", "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "decoder_layerdrop",
        "dropout", "dropout_p", "dropout_rate", "emb_pdrop", "embd_pdrop", "embed_dropout", "embedding_dropout",
        "encoder_layerdrop", "ffn_dropout", "hidden_dropout", "hidden_dropout_prob", "layerdrop", "mlp_dropout",
        "resid_dropout", "resid_pdrop", "residual_dropout",
        # losses of the model's own
        "aux_loss_alpha", "aux_loss_coef", "router_aux_loss_coef", "router_z_loss_coef", "z_loss_coefficient",
        # heads behind the last layer, of which only weights count
        "classifier_activation", "classifier_bias", "classifier_dropout", "classifier_dropout_prob",
        "classifier_dropout_rate", "classifier_pooling", "id2label", "label2id", "num_labels", "pooler_dropout",
        "pooler_hidden_act", "problem_type", "sparse_pred_ignore_index", "sparse_prediction", "summary_activation",
        "summary_first_dropout", "summary_last_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
        # defaults of generation
        "bad_words_ids", "begin_suppress_tokens", "do_sample", "early_stopping", "length_penalty", "max_length",
        "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_beams", "num_return_sequences", "output_scores",
        "remove_invalid_values", "repetition_penalty", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
        # of other programs, and of training
        "loss_type", "output_past", "prefix", "tokenizer_name", "torchscript",
    }
)  # fmt: skip
#: Nor can special tokens' ids; where positions begin behind the padding token's, the position table says so.
_IDS = ("_token_id", "_token_ids", "_token_index")
#: What a setting that no class declares means where it is left out, unless that is None.
_LEFT_OUT = {"scale_decoder_outputs": True}  # T5's, and UMT5's from transformers 5.24 on; before, it always scaled


def settings_of(model: PreTrainedModel) -> str:
    """Return all settings that may change what a model's layers compute, in one spelling."""
    return _written({"config": _counted(model.config), "padding positions": _padding_positions(model)})


def seen_settings(value: Any) -> Any:
    """Return everything a configuration says, for a look whether anything changed; in a hundredth of the time."""
    if isinstance(value, PretrainedConfig):
        kept = {name: each for name, each in vars(value).items() if not name.startswith(ATTENTION_SETTING)}
        return type(value), seen_settings(kept)
    if isinstance(value, dict):
        return {key: seen_settings(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [seen_settings(each) for each in value]
    return copy(value) if isinstance(value, set) else value


def sorted_keys(setting: Any) -> Any:
    """Return a setting with its keys in order: a file keeps them in another order than a configuration just made."""
    return {key: sorted_keys(setting[key]) for key in sorted(setting)} if isinstance(setting, dict) else setting


def _counted(config: PretrainedConfig) -> dict[str, Any]:
    """Return the settings of a configuration, and of those inside it, that count."""
    defaults, layers = _LEFT_OUT | _defaults(config), layer_overrides(config)
    found: dict[str, Any] = {"model_type": config.model_type}
    for name, value in vars(config).items():
        is_private = name.startswith("_") and name not in defaults
        if is_private or name in _WITHOUT_EFFECT or name.endswith(_IDS) or any(name in own for own in layers):
            continue
        if isinstance(value, PretrainedConfig) or _written(value) != _written(defaults.get(name)):
            found[name] = value
    return found | ({"layers": layers} if layers else {})


def _defaults(config: PretrainedConfig) -> dict[str, Any]:
    """Return the values a configuration's class declares; what it does not declare is None until somebody sets it."""
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(type(config))
    }


def _padding_positions(model: PreTrainedModel) -> list[int]:
    """Return the entries of position tables that stand for padding; RoBERTa's text begins behind it."""
    entries = {
        getattr(module, "padding_idx", None) for name, module in model.named_modules() if "position" in name.lower()
    }
    return sorted(entry for entry in entries if isinstance(entry, int))


def _written(value: Any) -> str:
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    """Return a setting as JSON may keep it: a tuple as a list, 1 as 1.0, keys as text."""
    if isinstance(value, PretrainedConfig):
        return _plain(_counted(value))
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, set | frozenset):
        return sorted(_written(each) for each in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value if value is None or isinstance(value, bool | str) else str(value)
