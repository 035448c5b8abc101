"""Bidirectional encoders: their layers are the base model, whatever stands on them; they read and write nothing."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from conformance.encoder_families import ENCODER_DECODERS, ENCODERS, build
from prefixkit.classification import classify, hidden_at
from prefixkit.config import Format, GenerationConfig
from prefixkit.data import Example
from prefixkit.errors import DataError, ModelError, UnsupportedModelError
from prefixkit.evaluation import heldout_loss
from prefixkit.generation import generate_texts
from prefixkit.injection import attach
from prefixkit.models import load_base_model
from prefixkit.models.fingerprint import fingerprint
from prefixkit.prefix import Head, HeadKind

CLASSES = {"bare": AutoModel, "masked": AutoModelForMaskedLM, "sequence": AutoModelForSequenceClassification}
#: Each family, and a weight of one of its layers.
LAYER = {"bert": "encoder.layer.1.output.dense.weight", "roberta": "encoder.layer.1.output.dense.weight",
         "modernbert": "layers.1.mlp.Wo.weight"}  # fmt: skip
FAMILIES = list(LAYER)


@pytest.fixture
def tokenizer(tiny_tokenizer):
    """Puts a token before a text, as BERT's [CLS], and one behind it."""
    closed = copy.deepcopy(tiny_tokenizer)
    closed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return closed


@pytest.fixture
def make(tokenizer):
    """A random model with the tokenizer's vocabulary; those of one family have the same layers under any class."""

    def model(name, kind="bare", **changes):
        sizes = {"vocab_size": len(tokenizer)} | changes
        made = build(ENCODERS[name], CLASSES[kind], **sizes)
        layers = build(ENCODERS[name], AutoModel, **sizes).state_dict()
        made.base_model.load_state_dict({key: layers[key] for key in made.base_model.state_dict()})
        return made

    return model


@pytest.fixture
def saved(make, tokenizer, tmp_path):
    """The folder of such a model."""

    def folder(name, kind="bare", **changes):
        where = tmp_path / f"{name} {kind}"
        make(name, kind, **changes).save_pretrained(where)
        tokenizer.save_pretrained(where)
        return where

    return folder


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def refused(folder):
    with pytest.raises(ModelError) as caught:
        load_base_model(str(folder))
    message = str(caught.value)
    assert message.startswith(f"{folder}: ")
    return message.removeprefix(f"{folder}: ")


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", FAMILIES)
def test_its_layers_are_loaded_from_the_files_of_any_class(name, kind, make, saved):
    base = load_base_model(str(saved(name, kind)), dtype="float64")
    expected = make(name).state_dict()
    found = base.model.state_dict()
    assert type(base.model) is type(make(name))
    assert set(found) == {key for key in expected if not key.startswith("pooler.")}
    assert all(torch.equal(weight, expected[key]) for key, weight in found.items())
    assert base.reads_both_ways
    assert not base.model.training
    assert not any(weight.requires_grad for weight in base.model.parameters())
    assert base.start_token_id is None


def test_a_decoder_does_not_read_both_ways(tiny_llama_dir):
    assert not load_base_model(str(tiny_llama_dir)).reads_both_ways


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_layers_weight_that_is_missing_is_refused(name, kind, make, saved):
    folder = saved(name, kind)
    stem = "" if kind == "bare" else f"{make(name).base_model_prefix}."
    change_weights(folder, lambda weights: weights.pop(stem + LAYER[name]))
    assert refused(folder) == (
        f"its files hold no weight {LAYER[name]} (1 missing); transformers would fill in random numbers, so it is"
        " refused: get the whole model"
    )


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_layers_weight_without_a_place_is_refused(name, kind, make, saved):
    folder = saved(name, kind)
    stem = "" if kind == "bare" else f"{make(name).base_model_prefix}."
    extra = stem + LAYER[name].replace("1", "7")
    change_weights(folder, lambda weights: weights.update({extra: torch.zeros(2)}))
    assert refused(folder) == (
        f"its files hold a weight {extra} that its architecture, {name}, has no place for (1 unused); get matching"
        " config.json and weights"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_what_stands_on_the_layers_may_be_missing_or_unknown(name, make, saved):
    folder = saved(name, "sequence")
    stem = make(name).base_model_prefix

    def strip(weights):
        for key in [key for key in weights if not key.startswith(f"{stem}.") or ".pooler." in key]:
            del weights[key]

    def crowd(weights):
        extra = ["classifier.out.weight", "cls.seq_relationship.weight", "lm_head.bias", f"{stem}.pooler.more.weight"]
        weights.update({key: torch.zeros(2) for key in extra})

    expected = make(name).state_dict()
    for change in (strip, crowd):
        change_weights(folder, change)
        found = load_base_model(str(folder), dtype="float64").model.state_dict()
        assert found
        assert all(torch.equal(weight, expected[key]) for key, weight in found.items())


@pytest.mark.parametrize(("name", "padding", "usable"), [("bert", 0, 64), ("roberta", 0, 63), ("roberta", 1, 62)])
def test_positions_an_encoder_never_uses_do_not_count(name, padding, usable, saved):
    base = load_base_model(str(saved(name, pad_token_id=padding)), dtype="float64")
    assert base.context_tokens == usable
    longest = (5,) * usable
    (hidden,) = hidden_at(base, [longest], [[0, usable - 1]], prefix=None)
    assert torch.isfinite(hidden).all()
    with pytest.raises((IndexError, RuntimeError)):
        base.model(input_ids=torch.tensor([[*longest, 5]]))
    with pytest.raises(DataError) as caught:
        hidden_at(base, [(5,), (*longest, 5)], [[0], [0]], prefix=None)
    assert str(caught.value) == (
        f"text 2: prefix 0 + text {usable + 1} tokens exceed the model's context of {usable}; cut it"
    )


def test_a_text_is_classified_up_to_the_last_usable_position(saved, make_prefix):
    base = load_base_model(str(saved("roberta")), dtype="float64")
    head = Head(HeadKind.SEQUENCE, ("a", "b"), torch.randn(2, 32, dtype=torch.float64), torch.zeros(2).double())
    prefix = replace(make_prefix(base.model), head=head)
    fitting, longer = classify(base, ["the " * 61, "the " * 62], prefix)
    assert (fitting.is_cut, longer.is_cut) == (False, True)
    assert fitting.probabilities == pytest.approx(longer.probabilities, abs=1e-12)
    with pytest.raises(DataError) as caught:
        classify(base, ["the " * 62], prefix, max_tokens=64)
    assert str(caught.value) == "text 1: prefix 0 + text 64 tokens exceed the model's context of 63; cut it"


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_same_model_with_any_head_or_none(name, make, saved):
    prints = {fingerprint(make(name, kind)) for kind in CLASSES}
    other_head = make(name, "sequence")
    with torch.no_grad():
        for key, weight in other_head.named_parameters():
            if not key.startswith(f"{other_head.base_model_prefix}.") or ".pooler." in key:
                weight.add_(1)
    prints.add(fingerprint(other_head))
    assert len(prints) == 1
    loaded = {fingerprint(load_base_model(str(saved(name, kind)), dtype="float64").model) for kind in CLASSES}
    assert len(loaded) == 1


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_another_model_when_a_layer_changes(name, kind, make):
    model = make(name, kind)
    before = fingerprint(model)
    with torch.no_grad():
        model.base_model.get_parameter(LAYER[name]).mul_(1.5)
    assert fingerprint(model) != before


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prefix_for_the_layers_steers_them_under_a_head(name, make, saved, make_prefix):
    base = load_base_model(str(saved(name, "masked")), dtype="float64")
    headed = AutoModelForSequenceClassification.from_pretrained(saved(name, "sequence"), dtype=torch.float64)
    headed.eval().requires_grad_(False)
    prefix = make_prefix(base.model)
    ids = base.tokenizer("the film was great", return_tensors="pt").input_ids
    plain = headed(input_ids=ids).logits
    with attach(headed, prefix), attach(base.model, prefix):
        steered = headed(input_ids=ids).logits
        own, other = headed.base_model(input_ids=ids)[0], base.model(input_ids=ids)[0]
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)  # two copies lie in memory differently
    assert float((steered - plain).abs().max()) > 1e-4
    assert torch.equal(headed(input_ids=ids).logits, plain)


def accepted(base):
    """The data formats a model may learn from."""

    def is_accepted(kind):
        try:
            base.check_format(kind)
        except UnsupportedModelError:
            return False
        return True

    return {kind.value for kind in Format if is_accepted(kind)}


def refusal(ask):
    with pytest.raises(UnsupportedModelError) as caught:
        ask()
    return str(caught.value)


def test_an_encoder_is_asked_for_labels_not_for_text(saved):
    folder = saved("bert")
    base = load_base_model(str(folder))
    message = (
        f"{folder}: bert reads both ways and writes no text; give a model that writes, or have it learn labels "
        "(data.format classes or tags)"
    )
    example = Example("", "the film", (1, 5, 6), (-100, 5, 6))
    assert accepted(base) == {"classes", "tags"}
    assert refusal(base.require_writer) == message
    assert refusal(lambda: base.check_format(Format.TEXT)) == message
    assert refusal(lambda: generate_texts(base, ["the film"], GenerationConfig(), seed=0)) == message
    assert refusal(lambda: heldout_loss(base, [example])) == message


def test_a_decoder_learns_from_every_format(tiny_llama_dir):
    assert accepted(load_base_model(str(tiny_llama_dir))) == set(Format)


def test_an_encoder_decoder_learns_no_labels(tokenizer, tmp_path):
    folder = tmp_path / "t5"
    build(ENCODER_DECODERS["t5"], vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    base = load_base_model(str(folder))
    assert accepted(base) == {"text", "input_target", "messages"}
    assert refusal(lambda: base.check_format(Format.TAGS)) == (
        f"{folder}: data.format tags needs an encoder, such as bert-base-uncased, or a decoder-only model; t5 has both"
    )
