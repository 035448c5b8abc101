"""Base models load whole and frozen, or are refused with one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, ViTConfig, ViTModel, WhisperConfig, WhisperForConditionalGeneration

from prefixkit.config import Attention, Dtype
from prefixkit.errors import ConfigError, ModelError, UnsupportedModelError
from prefixkit.models import load_base_model


@pytest.fixture
def folder(tiny_llama_dir, tmp_path):
    """A copy to damage."""
    return shutil.copytree(tiny_llama_dir, tmp_path / "a copy")


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(kind, folder):
    """The message `load_base_model` refuses a folder with, checked to be one line without a cause."""
    with pytest.raises(kind) as caught:
        load_base_model(str(folder))
    assert type(caught.value) is kind
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{folder}: ")
    return message.removeprefix(f"{folder}: ")


@pytest.mark.parametrize("which", ["tiny_llama_dir", "tiny_gpt2_dir"])
def test_folder_loads_frozen_in_evaluation_mode(which, request):
    where = str(request.getfixturevalue(which))
    base = load_base_model(where, dtype="float32")
    assert base.id == where
    assert base.dtype == torch.float32
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.context_tokens == 128
    assert base.licence == "unknown"
    assert base.revision is None
    expected = AutoModelForCausalLM.from_pretrained(where)
    ids = base.tokenizer("the movie was great", return_tensors="pt").input_ids
    assert torch.equal(base.model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("dtype", [Dtype.FLOAT64, Dtype.FLOAT32, Dtype.BFLOAT16, "float16"])
def test_dtype_is_that_of_every_weight(tiny_llama_dir, dtype):
    base = load_base_model(str(tiny_llama_dir), dtype=dtype)
    assert {weight.dtype for weight in base.model.parameters()} == {base.dtype} == {getattr(torch, str(dtype))}


@pytest.mark.parametrize("attention", list(Attention))
def test_attention_is_the_one_asked_for(tiny_llama_dir, attention):
    base = load_base_model(str(tiny_llama_dir), attention=attention)
    assert base.model.config._attn_implementation == attention.loaded


def test_unknown_attention_and_dtype_are_configuration_errors(tiny_llama_dir):
    with pytest.raises(ConfigError, match=r"^model.attention: expected sdpa, eager or fastest, got 'flashy'$"):
        load_base_model(str(tiny_llama_dir), attention="flashy")
    message = r"^model.dtype: expected auto, .*, float16, got 'bfloat'; did you mean \"bfloat16\"\?$"
    with pytest.raises(ConfigError, match=message):
        load_base_model(str(tiny_llama_dir), dtype="bfloat")


def test_loading_leaves_transformers_as_talkative_as_it_was(tiny_llama_dir, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_base_model(str(tiny_llama_dir))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_licence_comes_from_the_model_card(folder):
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n")
    assert load_base_model(str(folder)).licence == "apache-2.0"


def test_end_of_text_pads_where_there_is_no_padding_token(folder, tiny_llama_dir):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "pad_token"}))
    base = load_base_model(str(folder))
    assert base.is_pad_eos
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == 2
    assert base.model.get_input_embeddings().num_embeddings == len(base.tokenizer)
    assert not load_base_model(str(tiny_llama_dir)).is_pad_eos


def test_tokenizer_that_cannot_pad_is_refused(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("pad_token", "eos_token"):
        del config[name]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert refused(ModelError, folder) == (
        "its tokenizer has neither a padding nor an end-of-text token; set pad_token in it"
    )


def test_missing_weight_is_refused_instead_of_filled_with_random_numbers(folder):
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert refused(ModelError, folder) == (
        "its files hold no weight model.layers.1.mlp.up_proj.weight (1 missing); transformers would fill in"
        " random numbers, so it is refused: get the whole model"
    )


def test_missing_output_layer_is_fine_only_where_it_is_tied(folder):
    change_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    assert refused(ModelError, folder).startswith("its files hold no weight lm_head.weight (1 missing)")
    change_config(folder, tie_word_embeddings=True)
    model = load_base_model(str(folder)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weight_without_a_place_is_refused(folder):
    change_weights(folder, lambda weights: weights.update({"model.layers.2.extra": torch.zeros(2)}))
    assert refused(ModelError, folder) == (
        "its files hold a weight model.layers.2.extra that its architecture, llama, has no place for"
        " (1 unused); get matching config.json and weights"
    )


def test_buffers_that_older_versions_saved_are_let_pass(folder):
    change_weights(folder, lambda weights: weights.update({"model.layers.0.attn.masked_bias": torch.zeros(1)}))
    assert load_base_model(str(folder)).model is not None


def test_weight_of_another_shape_is_refused(folder):
    change_config(folder, intermediate_size=40)
    assert refused(ModelError, folder) == (
        "weight model.layers.0.mlp.down_proj.weight has shape [32, 48], but config.json asks for [32, 40];"
        " get matching config.json and weights"
    )


@pytest.mark.parametrize("keep", [0, -100])
def test_truncated_weights_are_refused(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = refused(ModelError, folder)
    assert message.startswith("a weights file is truncated or damaged (")
    assert message.endswith("; fetch it again")


def test_missing_shard_is_refused(folder, make_tiny_llama):
    (folder / "model.safetensors").unlink()
    make_tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert load_base_model(str(folder)).context_tokens == 128
    shards[1].unlink()
    assert shards[1].name in refused(ModelError, folder)


def test_folder_without_config_or_weights_or_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert refused(ModelError, folder) == ("no tokenizer that can be read; expected tokenizer.json beside the weights")
    (folder / "model.safetensors").unlink()
    assert refused(ModelError, folder) == "no weights in this folder; expected model.safetensors or its shards"
    (folder / "config.json").unlink()
    assert refused(ModelError, folder) == "no config.json in this folder; is it a transformers model folder?"


def test_config_that_is_not_json_is_refused(folder):
    (folder / "config.json").write_text("{")
    assert refused(ModelError, folder) == "its config.json is not valid JSON; fetch it again"


def test_architecture_unknown_to_transformers_is_refused(folder):
    change_config(folder, model_type="mamba9")
    assert refused(UnsupportedModelError, folder) == (
        "this version of transformers does not know its architecture (mamba9); upgrade transformers, or give"
        " another model"
    )


def test_model_with_its_own_code_is_refused_without_asking(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked on stdin whether to run foreign code"))
    (folder / "code.py").write_text("raise RuntimeError('foreign code was run')")
    change_config(folder, model_type="custom", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    assert refused(UnsupportedModelError, folder) == (
        "it needs Python code from its own repository, which prefixkit does not run; give a model whose"
        " architecture is part of transformers"
    )


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
OTHERS = {
    "whisper does not turn text into text; give one that does, such as t5": lambda: WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=9,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            begin_suppress_tokens=None,
        )
    ),
    "vit is no language model; give one that writes text left to right, or an encoder such as bert": lambda: ViTModel(
        ViTConfig(image_size=32, patch_size=16, **SMALL)
    ),
}


@pytest.mark.parametrize("message", OTHERS)
def test_model_that_reads_no_text_is_refused_by_name(tmp_path, message):
    OTHERS[message]().save_pretrained(tmp_path / "model")
    assert refused(UnsupportedModelError, tmp_path / "model") == message


def test_gguf_file_loads_exactly(tiny_gguf, tiny_gguf_model):
    base = load_base_model(str(tiny_gguf), dtype="float32")
    ids = base.tokenizer("the thing", return_tensors="pt").input_ids
    assert ids.shape[1] > 3
    assert torch.equal(base.model(ids).logits, tiny_gguf_model(ids).logits)
    assert base.context_tokens == 128
    assert base.tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


@pytest.mark.parametrize("damage", ["empty", "other", "short", "half"])
def test_damaged_gguf_is_refused(tiny_gguf, tmp_path, damage):
    whole = tiny_gguf.read_bytes()
    parts = {"empty": b"", "other": b"not a model", "short": b"GGUF", "half": whole[: len(whole) // 2]}
    path = tmp_path / "damaged.gguf"
    path.write_bytes(parts[damage])
    message = refused(ModelError, path)
    assert message.startswith("the GGUF file is damaged, or of an unknown kind (")
    assert message.endswith("); fetch it again")


def test_gguf_without_a_weight_is_refused(write_gguf, tmp_path):
    path = write_gguf(tmp_path / "partial.gguf", without=["blk.1.ffn_up.weight"])
    assert refused(ModelError, path).startswith(
        "its files hold no weight model.layers.1.mlp.up_proj.weight (1 missing)"
    )


def test_gguf_of_unknown_architecture_is_refused(write_gguf, tmp_path):
    path = write_gguf(tmp_path / "unknown.gguf", architecture="mamba9")
    assert refused(UnsupportedModelError, path) == (
        "transformers cannot read a GGUF of this architecture; give the original model instead"
    )


def test_revision_belongs_to_the_hub(tiny_llama_dir):
    message = r"^model.revision: .* is no hub model; leave the revision out, got 'main'$"
    with pytest.raises(ModelError, match=message):
        load_base_model(str(tiny_llama_dir), revision="main")


def test_hub_model_that_is_not_cached_is_refused_offline():
    assert refused(ModelError, "nobody/no-such-model") == (
        "not a folder, not packaged, and not in the local hub cache, while the hub is switched off;"
        " unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE once to fetch it; packaged models need no hub:"
        " smollm2-135m, all-minilm-l6-v2"
    )


def test_misspelt_packaged_model_is_suggested():
    assert refused(ModelError, "smolm2-135M").endswith('; did you mean "smollm2-135m"?')
