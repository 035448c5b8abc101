"""Tiny random bases, quantised as transformers quantises them, and the same bases with their weights written out."""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    TorchAoConfig,
)

from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import PrefixStates, SiteStates

#: Words of the tiny tokenizer, which a saved base is given to be loaded with.
VOCABULARY = 160
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def torchao(name: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        from torchao import quantization

        return TorchAoConfig(getattr(quantization, name)(**options))

    return make


def bitsandbytes(**options: Any) -> Callable[[], Any]:
    return lambda: BitsAndBytesConfig(**options)


#: Kinds that keep weights in fewer bits and compute as the weights written out would.
WEIGHT_ONLY: dict[str, Callable[[], Any]] = {
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
    "torchao int4": torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "bitsandbytes nf4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes nf4 twice": bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "bitsandbytes fp4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
}
#: Kinds that round activations as well, so that no written-out weights compute the same.
ROUNDING = {
    "bitsandbytes int8": bitsandbytes(load_in_8bit=True, llm_int8_threshold=0.0),
    "torchao int8 dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
}
KINDS = WEIGHT_ONLY | ROUNDING
FAMILIES = ("llama", "gpt2", "t5")


def needs(kind: str) -> str:
    """The library of a kind; skips where it is not installed."""
    library = kind.partition(" ")[0]
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed; pip install 'prefixkit[quantised]'")
    return library


def cells(kinds: Any) -> list[tuple[str, str]]:
    """Kinds by families; torchao leaves GPT-2's layers (Conv1D) alone, so there is nothing to hold it to."""
    return [(kind, family) for kind in kinds for family in FAMILIES if (kind[:7], family) != ("torchao", "gpt2")]


def plain(family: str) -> PreTrainedModel:
    """The base before it is quantised, in float32; biases and norms are perturbed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any
        if family == "llama":
            model = LlamaForCausalLM(LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, initializer_range=0.2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, **_SPECIAL))  # fmt: skip
        elif family == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128,
                                               initializer_range=0.2, **_SPECIAL))  # fmt: skip
        else:
            model = T5ForConditionalGeneration(T5Config(
                vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, initializer_factor=1.5,
                pad_token_id=0, eos_token_id=2, decoder_start_token_id=0))  # fmt: skip
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def load(folder: Path, family: str, **options: Any) -> PreTrainedModel:
    automodel: Any = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    return automodel.from_pretrained(folder, dtype=torch.float32, **options).eval().requires_grad_(False)  # type: ignore[no-any-return]


def written_out(quantised: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
    """The base with the weights its quantised layers compute with, read off by sending the unit matrix through."""
    twin = copy.deepcopy(model)
    layers = dict(quantised.named_modules())
    for name, module in twin.named_modules():
        layer: Any = layers[name]
        is_conv = type(module).__name__ == "Conv1D"
        if is_conv or isinstance(module, torch.nn.Linear):
            width = module.weight.shape[0 if is_conv else 1]
            columns = layer(torch.eye(width)) - (0 if layer.bias is None else layer.bias)
            module.weight.data = columns.clone() if is_conv else columns.T.clone()
    return twin


def random_states(model: PreTrainedModel, length: int = 3, *, seed: int = 1, grad: bool = False) -> PrefixStates:
    """Random states in float32."""
    dice = torch.Generator().manual_seed(seed)
    geometry = inspect_model(model).geometry
    shapes = [(site.kv_heads, length, site.head_dim) for site in geometry.sites]
    numbers = [[torch.randn(shape, generator=dice).requires_grad_(grad) for _ in range(2)] for shape in shapes]
    return PrefixStates(geometry, tuple(SiteStates(key, value) for key, value in numbers))
