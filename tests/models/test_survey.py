"""A model is surveyed from its configuration: what is said equals what the loaded model says, or it is refused."""

import inspect
import json
import shutil

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    BertConfig,
    BloomConfig,
    DeepseekV3Config,
    Gemma2Config,
    LlamaModel,
    MistralConfig,
    Qwen3Config,
    T5Config,
    ViTConfig,
)

from conformance.families import FAMILIES, build_model
from prefixkit.config import Attention, Placement
from prefixkit.errors import ModelError, UnsupportedModelError
from prefixkit.models import load_base_model
from prefixkit.models.inspect import Kind, inspect_model
from prefixkit.models.sources import SourceKind
from prefixkit.models.survey import survey_model

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


def describe_only(folder, config):
    """A model folder whose weights cannot be read: whoever tries fails."""
    folder.mkdir()
    config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"these are no weights")
    return str(folder)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_survey_equals_what_the_loaded_model_says(kind, request):
    folder = request.getfixturevalue(f"tiny_{kind}_dir")
    survey = survey_model(str(folder), num_virtual_tokens=5)
    base = load_base_model(str(folder))
    geometry = inspect_model(base.model).geometry
    assert survey.source is SourceKind.FOLDER
    assert survey.architecture == type(base.model).__name__
    assert survey.base_parameters == base.model.num_parameters()
    assert survey.attention == (Attention.SDPA, Attention.EAGER)
    assert survey.numbers_per_token == geometry.numbers_per_token == 2 * 2 * (16 if kind == "llama" else 32)
    assert survey.bytes_per_token(torch.bfloat16) == 2 * survey.numbers_per_token
    assert survey.context_tokens == base.context_tokens == 128
    assert survey.positions_left == 123
    (stack,) = survey.stacks
    assert (stack.placement, stack.layers, stack.query_heads) == (Placement.DECODER_SELF, 2, (4,))
    assert (stack.kv_heads, stack.head_dim) == ((2 if kind == "llama" else 4,), (8,))
    assert not survey.is_loaded


def test_weights_are_not_read(tmp_path):
    folder = describe_only(tmp_path / "a b", Qwen3Config(**SIZES, head_dim=16))
    survey = survey_model(folder)
    assert survey.stacks[0].head_dim == (16,)
    with pytest.raises(ModelError, match="truncated or damaged"):
        load_base_model(folder)


def test_a_gguf_file_is_surveyed(tiny_gguf, tiny_gguf_model):
    survey = survey_model(str(tiny_gguf))
    assert survey.source is SourceKind.GGUF
    assert survey.base_parameters == tiny_gguf_model.num_parameters()
    assert survey.stacks[0].kv_heads == (2,)


@pytest.mark.parametrize(
    ("config", "layers", "window"),
    [
        (Gemma2Config(**SIZES, head_dim=8, sliding_window=5), (0, 2), (5,)),
        (MistralConfig(**SIZES, sliding_window=7), (0, 1, 2, 3), (7,)),
        (MistralConfig(**SIZES, sliding_window=None), (), ()),
        (Qwen3Config(**SIZES, sliding_window=6), (), ()),  # not used unless asked for
        (Qwen3Config(**SIZES, sliding_window=6, use_sliding_window=True, max_window_layers=3), (3,), (6,)),
    ],
)
def test_windowed_layers_are_named(tmp_path, config, layers, window):
    (stack,) = survey_model(describe_only(tmp_path / "m", config)).stacks
    assert (stack.windowed_layers, stack.window_tokens) == (layers, window)


@pytest.mark.every_family
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_surveyed_without_its_weights(tmp_path, name):
    family = FAMILIES[name]
    config = CONFIG_MAPPING[family.model_type](**family.settings)
    survey = survey_model(describe_only(tmp_path / "m", config))
    assert survey.attention == family.attentions
    geometry = inspect_model(build_model(name, family.attentions[0])).geometry
    assert survey.numbers_per_token == geometry.numbers_per_token
    assert survey.stacks[0].window_tokens == (() if family.window is None else (family.window,))


def test_an_encoder_decoder_is_surveyed_stack_by_stack(tmp_path):
    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4)
    survey = survey_model(describe_only(tmp_path / "m", config))
    assert survey.kind is Kind.ENCODER_DECODER
    found = [(s.placement, s.layers, s.numbers_per_token) for s in survey.stacks]
    assert found == [
        (Placement.ENCODER_SELF, 2, 2 * 64),
        (Placement.DECODER_SELF, 3, 3 * 64),
        (Placement.CROSS, 3, 3 * 64),
    ]
    assert survey.numbers_per_token == 8 * 64
    assert (survey.context_tokens, survey.positions_left) == (None, None)


def test_an_encoder_is_surveyed(tmp_path):
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    survey = survey_model(describe_only(tmp_path / "m", config))
    assert survey.kind is Kind.ENCODER
    assert [stack.placement for stack in survey.stacks] == [Placement.ENCODER_SELF]


def test_a_family_without_sdpa_is_offered_eager_alone(tmp_path):
    survey = survey_model(describe_only(tmp_path / "m", Gemma2Config(**SIZES, head_dim=8)))
    assert survey.attention == (Attention.EAGER,)


def test_a_family_without_an_eager_function_is_offered_sdpa_alone(tiny_llama_dir, monkeypatch):
    def none(module):
        raise UnsupportedModelError(f"{type(module).__name__}: its family defines no eager attention; use sdpa")

    monkeypatch.setattr("prefixkit.models.survey.eager_attention", none)
    assert survey_model(str(tiny_llama_dir)).attention == (Attention.SDPA,)


def test_a_model_that_looks_at_numbers_is_loaded(tiny_llama_dir, monkeypatch):
    forward = LlamaModel.forward

    def looking(self, input_ids=None, **options):
        assert input_ids.max().item() >= 0
        return forward(self, input_ids=input_ids, **options)

    looking.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(LlamaModel, "forward", looking)
    survey = survey_model(str(tiny_llama_dir))
    assert survey.is_loaded
    assert survey.stacks[0].layers == 2


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2),
         "BloomForCausalLM: its attention does not go through transformers' attention interface"),
        (ViTConfig(), "vit is no language model; give one that writes text left to right, or an encoder such as bert$"),
        (DeepseekV3Config(**SIZES | {"num_key_value_heads": 4}, n_routed_experts=4, num_experts_per_tok=2,
                          n_group=1, topk_group=1, moe_intermediate_size=8),
         "keys and values of different shape are not supported"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_take_a_prefix_is_refused_without_reading_weights(tmp_path, config, reason):
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        survey_model(describe_only(tmp_path / "m", config))
    assert "\n" not in str(caught.value)


def test_a_configuration_that_cannot_be_read_is_a_model_error(tmp_path, tiny_llama_dir):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_llama_dir, folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json is not valid JSON"):
        survey_model(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba9"}))
    with pytest.raises(UnsupportedModelError, match=r"does not know its architecture \(mamba9\)"):
        survey_model(str(folder))


def test_a_revision_belongs_to_the_hub(tiny_llama_dir):
    with pytest.raises(ModelError, match="is no hub model; leave the revision out, got 'main'"):
        survey_model(str(tiny_llama_dir), revision="main")
