"""Families of transformers that cannot take a prefix, with the reason each is refused for, by name."""

from dataclasses import dataclass
from typing import Any

import transformers
from packaging.version import Version

from conformance.families import EXPERTS, GPT, GROUPED, ROUTED, TOKENS


@dataclass(frozen=True)
class Refusal:
    """A model type, settings of a tiny one, and what the refusal says after the model's name.

    Attributes:
        settings: of its configuration.
        reason: what is said.
        until: the release of transformers that brought the family onto the attention interface, if one did.
    """

    settings: dict[str, Any]
    reason: str
    until: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether the transformers at hand is that release or a later one; the family then takes prefixes."""
        return self.until is not None and Version(transformers.__version__) >= Version(self.until)


INTERFACE = "its attention does not go through transformers' attention interface"
LAYERS = "layers are attention layers that can take a prefix"
CARRIES = "carries more from token to token than the keys and values its attention reads"
POSITIONS = "numbers the positions of a text neither by columns nor by its attention mask"
MASKS = "masks its attention in a way of its own"
KEYS = "its attention treats keys differently"
NO_POSITIONS = "takes no position_ids"

SMALL = GROUPED | {"num_hidden_layers": 2}
HYBRID = SMALL | EXPERTS | {
    "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16}  # fmt: skip
LATENT = SMALL | ROUTED | {
    "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "head_dim": 4}  # fmt: skip
STATE_SPACE = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}
BOTH_WAYS = SMALL | {"is_decoder": True}
ENCODER_DECODER = TOKENS | {
    "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 2,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "max_position_embeddings": 64}  # fmt: skip

REFUSED: dict[str, Refusal] = {
    # attention code of their own
    "bloom": Refusal(TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}, INTERFACE),
    "codegen": Refusal(GPT | {"rotary_dim": 4}, INTERFACE, until="5.24"),
    "falcon": Refusal(
        TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "new_decoder_architecture": True, "num_kv_heads": 2}, INTERFACE),
    "gpt_neo": Refusal(
        TOKENS | {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        INTERFACE),
    "gptj": Refusal(GPT | {"rotary_dim": 4}, INTERFACE, until="5.24"),
    "mpt": Refusal(TOKENS | {"d_model": 32, "n_layers": 2, "n_heads": 4}, INTERFACE),
    "xglm": Refusal(
        TOKENS | {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}, INTERFACE),
    # no position ids to move
    "mamba": Refusal(TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, NO_POSITIONS),
    "mamba2": Refusal(TOKENS | STATE_SPACE | {"hidden_size": 32, "num_hidden_layers": 2}, NO_POSITIONS),
    "bart": Refusal(ENCODER_DECODER, NO_POSITIONS),
    # positions that begin behind the padding id
    "roberta": Refusal(BOTH_WAYS, POSITIONS),
    "xlm-roberta": Refusal(BOTH_WAYS, POSITIONS),
    # some layers, or parts of layers, are no attention
    "qwen3_next": Refusal(HYBRID, f"only 1 of its 2 {LAYERS}"),
    "qwen3_5_text": Refusal(HYBRID, f"only 1 of its 2 {LAYERS}"),
    "recurrent_gemma": Refusal(SMALL | {"num_hidden_layers": 3, "lru_width": 32}, f"only 1 of its 3 {LAYERS}"),
    "falcon_h1": Refusal(
        SMALL | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}, CARRIES),
    # keys and values made from something smaller
    "deepseek_v2": Refusal(LATENT | {"v_head_dim": 8}, CARRIES),
    "deepseek_v3": Refusal(LATENT | {"v_head_dim": 6}, "keys and values of different shape are not supported"),
    "deepseek_v4": Refusal(SMALL | ROUTED | {"head_dim": 8}, CARRIES),
    "minicpm3": Refusal(LATENT | {"v_head_dim": 8}, CARRIES),
    "jetmoe": Refusal(SMALL | EXPERTS | {"kv_channels": 8}, CARRIES),
    # sparse attention and biases that know only the text
    "doge": Refusal(SMALL, MASKS),
    "deepseek_v32": Refusal(LATENT | {"v_head_dim": 8, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 8}, KEYS),
    "diffllama": Refusal(SMALL, "runs one attention layer several times per token"),
}  # fmt: skip
