"""The registry: every decoder-only family prefixkit is held to, as a tiny random float64 model.

One entry is one column of what transformers' attention interface can do: multi-query and grouped heads, windows,
chunks, sinks, soft-capping, experts, learned and rotary positions. Families that must be refused stand in
`refusals.py`. A new family is one line here; the conformance suite and its page in the docs follow.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97
CONTEXT = 64
WINDOW = 4


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        model_type: transformers' name of it.
        settings: of its configuration.
        window: how far text sees text, in layers that have a window; None where all see all.
        attentions: the implementations it is run with; soft-capping and sinks exist in eager attention only.
        counts_by_mask: numbers text without position ids by its attention mask, not by columns.
        core: runs in the tests of `injection/` too.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    window: int | None = None
    attentions: tuple[str, ...] = ("sdpa", "eager")
    counts_by_mask: bool = False
    core: bool = False


TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROTARY: dict[str, Any] = TOKENS | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT, "initializer_range": 0.2}  # fmt: skip
GROUPED = ROTARY | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 16}  # a head size that is not hidden_size / heads
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
WINDOWED = {"sliding_window": WINDOW}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GPT: dict[str, Any] = TOKENS | {
    "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT, "initializer_range": 0.2,
    "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "gpt2": Family("gpt2", GPT, core=True),
    "llama": Family("llama", GROUPED, core=True),
    "qwen2": Family("qwen2", GROUPED, core=True),
    "qwen3": Family("qwen3", HEADS, core=True),
    "gemma2": Family("gemma2", HEADS | WINDOWED | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
                     window=WINDOW, attentions=("eager",), core=True),
    "gemma3": Family("gemma3_text", HEADS | WINDOWED | MIXED, window=WINDOW, core=True),
    "mistral": Family("mistral", GROUPED | {"sliding_window": None}, core=True),
    "mistral-window": Family("mistral", GROUPED | WINDOWED, window=WINDOW, core=True),
    "opt": Family("opt", TOKENS | {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32,
        "max_position_embeddings": CONTEXT, "init_std": 0.2, "dropout": 0.0}, counts_by_mask=True, core=True),
    "gpt-neox": Family("gpt_neox", ROTARY | {"rotary_pct": 0.5}, core=True),
    "phi3": Family("phi3", GROUPED | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}, core=True),
    # one attention for many names: learned positions, multi-query, other norms, biases and scales
    "gpt-bigcode": Family("gpt_bigcode", GPT | {"multi_query": True}),
    "biogpt": Family("biogpt", ROTARY | {
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}),
    "ctrl": Family("ctrl", GPT | {"dff": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "phi": Family("phi", GROUPED | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "phi3-window": Family("phi3", GROUPED | WINDOWED | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}, window=WINDOW),
    "starcoder2": Family("starcoder2", GROUPED | {"residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "starcoder2-window": Family("starcoder2", GROUPED | WINDOWED | {
        "residual_dropout": 0.0, "embedding_dropout": 0.0}, window=WINDOW),
    "stablelm": Family("stablelm", GROUPED | {"hidden_dropout": 0.0, "qk_layernorm": True}),
    "gemma": Family("gemma", HEADS),
    "vaultgemma": Family("vaultgemma", HEADS | WINDOWED | MIXED | {"attn_logit_softcapping": 2.0},
                         window=WINDOW, attentions=("eager",)),
    "cohere": Family("cohere", GROUPED | {"use_qk_norm": True}),
    "cohere2": Family("cohere2", GROUPED | WINDOWED | MIXED, window=WINDOW),
    "olmo": Family("olmo", GROUPED | {"clip_qkv": 0.5}),
    "olmo2": Family("olmo2", GROUPED),
    "olmo3": Family("olmo3", GROUPED | WINDOWED | MIXED, window=WINDOW),
    "granite": Family("granite", GROUPED | {
        "attention_multiplier": 0.3, "residual_multiplier": 0.7, "embedding_multiplier": 2.0, "logits_scaling": 0.5}),
    "smollm3": Family("smollm3", GROUPED | {"no_rope_layer_interval": 2}),
    "glm": Family("glm", HEADS | {"partial_rotary_factor": 0.5}),
    "glm4": Family("glm4", HEADS | {"partial_rotary_factor": 0.5}),
    "helium": Family("helium", GROUPED | {"head_dim": 8}),
    "nemotron": Family("nemotron", HEADS),
    "persimmon": Family("persimmon", ROTARY | {"hidden_dropout": 0.0}),
    "apertus": Family("apertus", GROUPED),
    "arcee": Family("arcee", GROUPED),
    "bitnet": Family("bitnet", GROUPED),
    "cwm": Family("cwm", HEADS | WINDOWED | MIXED, window=WINDOW),
    "ernie4.5": Family("ernie4_5", GROUPED | {"head_dim": 8}),
    "exaone4": Family("exaone4", GROUPED | WINDOWED | MIXED, window=WINDOW),
    "hunyuan": Family("hunyuan_v1_dense", GROUPED | {"head_dim": 8}),
    "jais2": Family("jais2", GROUPED),
    "ministral": Family("ministral", HEADS | WINDOWED | MIXED, window=WINDOW),
    "ministral3": Family("ministral3", HEADS),
    "nanochat": Family("nanochat", GROUPED),
    "seed-oss": Family("seed_oss", HEADS),
    "llama4": Family("llama4_text", HEADS | EXPERTS | {
        "intermediate_size_mlp": 48, "attention_chunk_size": WINDOW,
        "no_rope_layers": [1, 0, 1]}, window=WINDOW),
    # mixtures of experts
    "mixtral": Family("mixtral", GROUPED | EXPERTS),
    "qwen2-moe": Family("qwen2_moe", GROUPED | EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3-moe": Family("qwen3_moe", HEADS | EXPERTS),
    "gpt-oss": Family("gpt_oss", HEADS | EXPERTS | WINDOWED | MIXED, window=WINDOW, attentions=("eager",)),
    "olmoe": Family("olmoe", GROUPED | EXPERTS),
    "granite-moe": Family("granitemoe", GROUPED | EXPERTS | {"attention_multiplier": 0.3}),
    "phi-moe": Family("phimoe", GROUPED | EXPERTS),
    "ernie4.5-moe": Family("ernie4_5_moe", GROUPED | EXPERTS | {"moe_num_experts": 4, "moe_k": 2}),
    "glm4-moe": Family("glm4_moe", GROUPED | ROUTED | {"head_dim": 8}),
    "minimax-m2": Family("minimax_m2", GROUPED | EXPERTS | {"head_dim": 8, "rotary_dim": 8}),
    "hunyuan-moe": Family("hunyuan_v1_moe", GROUPED | EXPERTS | {"head_dim": 8, "moe_topk": 2}),
    "solar-open": Family("solar_open", GROUPED | ROUTED | {"head_dim": 8}),
    "afmoe": Family("afmoe", GROUPED | EXPERTS | WINDOWED | MIXED | {"head_dim": 8}, window=WINDOW),
}  # fmt: skip

CORE = [name for name, family in FAMILIES.items() if family.core]
GLOBAL = [name for name, family in FAMILIES.items() if family.window is None]
WINDOWS = [name for name, family in FAMILIES.items() if family.window is not None]


def build(model_type: str, settings: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """A random model in float64, in evaluation mode, its biases and norms perturbed so that no zero hides a bug."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings)).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the grouped kernels know no float64
    return model.requires_grad_(False)


def build_model(name: str, attention: str = "sdpa", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of a registered family; `attention` gives way where the family has no such implementation."""
    family = FAMILIES[name]
    attention = attention if attention in family.attentions else family.attentions[0]
    return build(family.model_type, {"attn_implementation": attention} | family.settings | changes, seed)
