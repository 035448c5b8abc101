# ruff: noqa: E402 - the environment and the import hook come before the imports they are about
"""Shared by all tests: no network, one thread, shapes checked at every call, tiny models."""

import gc
import os

# Before anything imports a hub client: a test that would download fails instead.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import jaxtyping

# Must come before the first import of prefixkit: every signature is then checked at run time.
jaxtyping.install_import_hook("prefixkit", "beartype.beartype")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefixkit.injection import apart

# The families prefixkit is held to, and what tests build from them.
pytest_plugins = ["conformance.fixtures", "conformance.record"]

# Two busy cores with two threads per test process are several times slower than one thread each.
torch.set_num_threads(1)

# The caches of tiny models are read as those of long texts are.
apart.WORTHWHILE = 0


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later garbage collection: runs ask for many, of half a second each."""
    gc.collect()
    gc.freeze()


SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>"]
VOCABULARY = """
a about acting actor actors all also amazing an and as at awful bad beautiful best boring but by
camera cast character characters cinema comedy could director drama dull end ending even excellent
ever every fails film films for found from fun funny good great had hate he her his horror i if in
is it its just lost love loved made make me minutes moment more most movie movies my never nice no
not of on one performance perfect people plot poor quite really review say scene scenes score script
see she so some story strong superb terrible than that the their there they this time to too true
truly was waste watch watching weak well were what when who will with wonderful work worst would you
user assistant system : . , ! ? positive negative write
"""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<bos>' + message['role'] + ' : ' }}"
    "{{ message['content'] + ' <eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant : ' }}{% endif %}"
)


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of a small vocabulary of film reviews; anything else is <unk>."""
    words = list(dict.fromkeys([*SPECIAL_TOKENS, *VOCABULARY.split(), "\n"]))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    newline = pre_tokenizers.Split("\n", "isolated")
    spaces = pre_tokenizers.Split(" ", "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([newline, spaces, pre_tokenizers.Punctuation()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Shared by the whole session: do not change it, load a copy from `tiny_llama_dir` instead."""
    return build_tiny_tokenizer()


@pytest.fixture(scope="session")
def make_tiny_llama(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    """A factory of random Llamas with grouped-query attention; keywords change its configuration."""

    def make(seed: int = 0, **changes: object) -> LlamaForCausalLM:
        settings: dict[str, object] = {
            "vocab_size": len(tiny_tokenizer), "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 128, "initializer_range": 0.2,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()

    return make


@pytest.fixture(scope="session")
def make_tiny_gpt2(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., GPT2LMHeadModel]:
    """A factory of random GPT-2s; keywords change its configuration."""

    def make(seed: int = 0, **changes: object) -> GPT2LMHeadModel:
        settings: dict[str, object] = {
            "vocab_size": len(tiny_tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
        }  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return GPT2LMHeadModel(GPT2Config(**(settings | changes))).eval()

    return make


@pytest.fixture(scope="session")
def tiny_llama_dir(
    tmp_path_factory: pytest.TempPathFactory,
    make_tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A random Llama (2 layers, 4 query heads, 2 KV heads, head_dim 8, 128 positions) and its tokenizer."""
    folder = tmp_path_factory.mktemp("base models") / "tiny llama"
    make_tiny_llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2_dir(
    tmp_path_factory: pytest.TempPathFactory,
    make_tiny_gpt2: Callable[..., GPT2LMHeadModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A random GPT-2 (2 layers, 4 heads, head_dim 8, 128 positions) and its tokenizer."""
    folder = tmp_path_factory.mktemp("base models") / "tiny gpt2"
    make_tiny_gpt2().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
