"""Encoder-decoder and encoder families as tiny random float64 models, and what they read."""

from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, PreTrainedModel

VOCABULARY = 97

T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "dropout_rate": 0.0,
    "initializer_factor": 1.5, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
#: Encoder and decoder differ in depth and in their number of heads.
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_position_embeddings": 64,
    "dropout": 0.0, "init_std": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
WHISPER: dict[str, Any] = BART | {
    "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64, "decoder_start_token_id": 1,
    "begin_suppress_tokens": None, "suppress_tokens": None,
}  # fmt: skip

ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", T5),
    "t5-asymmetric": ("t5", T5 | {"num_decoder_layers": 3}),
    "t5-v1.1": ("t5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "flan-t5-small": ("t5", T5 | {"d_kv": 16, "num_heads": 3, "feed_forward_proj": "gated-gelu"}),
    "t5-3b": ("t5", T5 | {"d_kv": 32, "num_heads": 8}),
    "mt5": ("mt5", T5 | {"d_kv": 16, "feed_forward_proj": "gated-gelu"}),
    "umt5": ("umt5", T5),
    "bart": ("bart", BART),
    "mbart": ("mbart", BART),
    "pegasus": ("pegasus", BART),
    "marian": ("marian", BART),
    "m2m-100": ("m2m_100", BART),
    "blenderbot": ("blenderbot", BART),
    "whisper": ("whisper", WHISPER),
}

ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", ENCODER),
    "roberta": ("roberta", ENCODER),
    "electra": ("electra", ENCODER | {"embedding_size": 32}),
    "xlm-roberta": ("xlm-roberta", ENCODER),
    "modernbert": ("modernbert", ENCODER | {
        "local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}),
}  # fmt: skip


def build(
    family: tuple[str, dict[str, Any]], automodel: Any = AutoModelForSeq2SeqLM, attention: str = "sdpa", **changes: Any
) -> PreTrainedModel:
    """A random frozen model in float64, its biases and norms perturbed so that no zero hides a bug."""
    model_type, settings = family
    if model_type == "whisper":
        automodel = AutoModelForSpeechSeq2Seq
    config = CONFIG_MAPPING[model_type](**settings | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = automodel.from_config(config, attn_implementation=attention).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def source_of(model: PreTrainedModel, rows: int, tokens: int = 6, seed: int = 3) -> dict[str, Tensor]:
    """What the encoder reads: token ids, or Whisper's features."""
    dice = torch.Generator().manual_seed(seed)
    if model.main_input_name == "input_features":
        shape = (rows, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        return {"input_features": torch.randn(shape, generator=dice, dtype=torch.float64)}
    return {"input_ids": torch.randint(3, VOCABULARY, (rows, tokens), generator=dice)}
