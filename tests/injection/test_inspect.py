"""A model is asked how it can take a prefix, and refused by name with the reason if it cannot."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    BartForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    BigBirdPegasusConfig,
    BigBirdPegasusForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LongT5Config,
    LongT5ForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5ForSequenceClassification,
)

from conformance.encoder_families import ENCODER_DECODERS, ENCODERS, build
from prefixkit.errors import UnsupportedModelError
from prefixkit.models.inspect import inspect_model

SMALL = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "block_size": 4}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "kv_heads", "head_dim"),
    [("gpt2", 4, 8), ("llama", 2, 8), ("qwen3", 2, 16), ("gpt-neox", 4, 8), ("opt", 4, 8), ("gemma2", 2, 16)],
)
def test_the_geometry_is_what_the_attention_sees(make_model, family, kv_heads, head_dim):
    sites = inspect_model(make_model(family)).geometry.sites
    assert [(s.layer, s.query_heads, s.kv_heads, s.head_dim) for s in sites] == [
        (layer, 4, kv_heads, head_dim) for layer in range(3)
    ]


def test_asking_leaves_no_trace(make_model, family):
    model = make_model(family, fresh=True)
    before = model.config._attn_implementation
    inspect_model(model)
    assert model.config._attn_implementation == before


def test_a_model_without_weights_can_be_asked(make_model, family):
    real = make_model(family)
    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(
            real.config, dtype=torch.bfloat16, attn_implementation=real.config._attn_implementation
        )
    assert {weight.device.type for weight in hollow.parameters()} == {"meta"}
    assert inspect_model(hollow).geometry == inspect_model(real).geometry


def test_what_writes_without_being_causal_is_refused():
    model = BertLMHeadModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                       intermediate_size=16))  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="BertLMHeadModel: writes text with layers that are not causal"):
        inspect_model(model)


def test_layers_of_both_kinds_are_refused(make_model):
    model = make_model("llama", fresh=True)
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match="some of its layers are causal and some are not"):
        inspect_model(model)


def test_a_model_that_fails_on_a_few_tokens_is_refused_with_what_it_said(make_model):
    model = make_model("llama", fresh=True, vocab_size=2, pad_token_id=None, bos_token_id=0, eos_token_id=1)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM: cannot run on token ids alone: index out of"):
        inspect_model(model)


@pytest.mark.parametrize("change", ["pruned", "replaced", "added"])
def test_a_model_whose_layers_changed_is_asked_again(make_model, change):
    """A remembered layer that is gone would take a prefix all the same, and train it on nothing."""
    model = make_model("llama", fresh=True)
    before = inspect_model(model)
    assert inspect_model(model) is before
    layers = model.model.layers
    if change == "pruned":
        model.model.layers = layers[:2]
    elif change == "replaced":
        layers[1] = type(layers[1])(model.config, 1).double()
    else:
        layers.append(type(layers[1])(model.config, 3).double())
    model.config.num_hidden_layers = len(model.model.layers)
    now = inspect_model(model)
    assert now.attention == tuple(layer.self_attn for layer in model.model.layers)
    assert len(now.geometry.sites) == {"pruned": 2, "replaced": 3, "added": 4}[change]


def test_layers_pruned_behind_the_configurations_back_are_refused(make_model):
    model = make_model("llama", fresh=True)
    inspect_model(model)
    model.model.layers = model.model.layers[:2]
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM: "):
        inspect_model(model)


def _gpt2(implementation: str, **options: bool) -> PreTrainedModel:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, **options))
    model.config._attn_implementation = implementation
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)),
         "BloomForCausalLM: its attention does not go through transformers' attention interface"),
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1)),
         "MambaForCausalLM: takes no position_ids"),
        (lambda: LongT5ForConditionalGeneration(LongT5Config(vocab_size=50, d_model=16, num_layers=1, num_heads=2)),
         "LongT5ForConditionalGeneration: only 0 of its 1 encoder_self layers are attention layers"),
        (lambda: BigBirdPegasusForConditionalGeneration(BigBirdPegasusConfig(**SMALL)),
         "BigBirdPegasusForConditionalGeneration: "),
        (lambda: _gpt2("flex_attention"), "GPT2LMHeadModel: attention implementation 'flex_attention' is not"),
        (lambda: _gpt2("eager", reorder_and_upcast_attn=True),
         "GPT2LMHeadModel: reorder_and_upcast_attn bypasses the attention interface"),
        (lambda: _gpt2("sdpa", add_cross_attention=True),
         r"GPT2LMHeadModel: has cross-attention \(add_cross_attention\)"),
        (lambda: BertLMHeadModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                            intermediate_size=16, is_decoder=True, add_cross_attention=True)),
         r"BertLMHeadModel: has cross-attention \(add_cross_attention\)"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_take_a_prefix_is_refused_with_the_reason(model: object, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        inspect_model(model())  # type: ignore[operator]


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_a_model_that_was_inspected_is_not_kept_alive(name):
    """Its anatomy holds the module that runs its stacks, which may be the model itself."""
    known = build(ENCODER_DECODERS[name]) if name in ENCODER_DECODERS else build(ENCODERS[name], AutoModel)
    inspect_model(known)
    copied = copy.deepcopy(known)
    assert inspect_model(copied).stacks[0] is not inspect_model(known).stacks[0]
    gone = weakref.ref(known)
    del known
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("automodel", [BartForSequenceClassification, T5ForSequenceClassification])
def test_an_encoder_decoder_that_labels_texts_is_refused_by_name(automodel):
    family = "bart" if automodel is BartForSequenceClassification else "t5"
    kind, settings = ENCODER_DECODERS[family]
    with pytest.raises(UnsupportedModelError, match="labels texts from its decoder's last token, which is not"):
        inspect_model(automodel(CONFIG_MAPPING[kind](**settings)))
