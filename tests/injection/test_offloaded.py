"""Bases that accelerate spread over a device map or offloaded to disk answer and learn as the same base in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from conformance.encoder_families import ENCODER_DECODERS, build
from prefixkit.errors import ModelError, UnsupportedModelError
from prefixkit.injection import attach
from prefixkit.models import weights
from prefixkit.models.fingerprint import fingerprint, weights_hash
from prefixkit.models.inspect import inspect_model
from prefixkit.models.text_states import text_states
from prefixkit.prefix import PrefixEncoder, reproduce
from prefixkit.training.loss import has_plain_head, summed_loss

Make = Callable[..., Any]
#: Where the parts of each family lie; what a map leaves out follows its parent.
PARTS = {
    "llama": ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm",
              "model.rotary_emb", "lm_head"],
    "gpt2": ["transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.1", "transformer.h.2",
             "transformer.ln_f", "lm_head"],
    "opt": ["model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.layers.0",
            "model.decoder.layers.1", "model.decoder.layers.2", "model.decoder.final_layer_norm", "lm_head"],
    "t5-v1.1": ["shared", "encoder.embed_tokens", "encoder.block.0", "encoder.block.1", "encoder.final_layer_norm",
                "encoder.dropout", "decoder.embed_tokens", "decoder.block.0", "decoder.block.1",
                "decoder.final_layer_norm", "decoder.dropout", "lm_head"],
}  # fmt: skip
EMBEDDINGS = ("wte", "embed_tokens", "shared", "lm_head")
PLACES = ["all on the cpu", "part by part on the cpu", "one layer on disk", "all layers on disk", "all on disk"]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def device_map(family: str, place: str) -> dict[str, str]:
    if place == "all on the cpu":
        return {"": "cpu"}
    layered = dict.fromkeys(PARTS[family], "cpu")
    if place == "one layer on disk":
        return layered | {next(part for part in layered if part.endswith(".1")): "disk"}
    if place == "all layers on disk":
        return {part: "cpu" if part.endswith(EMBEDDINGS) else "disk" for part in layered}
    if place == "all on disk":  # accelerate cannot bring back T5's embeddings, which have three names
        return {part: "cpu" if part.endswith(EMBEDDINGS) and family == "t5-v1.1" else "disk" for part in layered}
    return layered


@pytest.fixture(scope="module")
def in_memory(make_model: Make) -> Callable[[str], PreTrainedModel]:
    known = {}

    def make(family: str) -> PreTrainedModel:
        if family not in known:
            seq2seq = family in ENCODER_DECODERS
            known[family] = build(ENCODER_DECODERS[family]) if seq2seq else make_model(family, fresh=True)
        return known[family]

    return make


@pytest.fixture(scope="module")
def folders(in_memory: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def make(family: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / "saved" / family
        if not folder.exists():
            in_memory(family).save_pretrained(folder)
        return folder

    return make


DOORS = ["from_pretrained", "dispatch_model"]
CASES = [(family, place, door) for family in PARTS for place in PLACES for door in DOORS]
#: What the default tests try: every family on disk, every place of one stack and of two, both doors.
CORE_CASES = {(family, "all on disk", DOORS[0]) for family in PARTS} | {
    *(("llama", place, door) for place in PLACES for door in DOORS),
    *(("t5-v1.1", place, DOORS[0]) for place in PLACES),
}


@pytest.fixture(params=[pytest.param(case, marks=[] if case in CORE_CASES else pytest.mark.slow, id=" - ".join(case))
                        for case in CASES])  # fmt: skip
def pair(request: Any, in_memory: Make, folders: Make, tmp_path: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The base in memory, and the same base where the map puts it."""
    family, place, door = request.param
    places = device_map(family, place)
    automodel: Any = AutoModelForSeq2SeqLM if family in ENCODER_DECODERS else AutoModelForCausalLM
    options = {"dtype": torch.float64}
    if door == "from_pretrained":
        options |= {"device_map": places, "offload_folder": tmp_path}
    spread = automodel.from_pretrained(folders(family), **options).eval()
    if door == "dispatch_model":
        spread = dispatch_model(spread, places, offload_dir=tmp_path, force_hooks=True)
    assert any(weight.is_meta for weight in spread.parameters()) == ("disk" in places.values())
    return in_memory(family), spread.requires_grad_(False)


def inputs_of(model: PreTrainedModel, make_ids: Make, rows: int = 3) -> dict[str, torch.Tensor]:
    ids = make_ids(rows, 6)
    mask = torch.ones_like(ids)
    mask[-1, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | ({"decoder_input_ids": make_ids(rows, 4, seed=9)} if model.config.is_encoder_decoder else {})


def test_mixed_rows_answer_and_generate_as_in_memory_and_detach_restores(
    pair: Any, make_prefix: Make, make_ids: Make
) -> None:
    known, spread = pair
    rows = [make_prefix(known, 4, seed=4), None, make_prefix(known, 2, seed=5)]
    assert inspect_model(spread).geometry == inspect_model(known).geometry
    assert inspect_model(spread).counts_by_mask == inspect_model(known).counts_by_mask
    assert fingerprint(spread) == fingerprint(known)
    inputs = inputs_of(known, make_ids)
    source = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    found = []
    for model in (known, spread):
        before = model(**inputs).logits
        with attach(model, rows):
            found.append((model(**inputs).logits, model.generate(**source, **settings)))
        assert torch.equal(model(**inputs).logits, before)
        assert float((found[-1][0][0] - before[0]).abs().max()) > 1e-4
    torch.testing.assert_close(found[1][0], found[0][0], **EXACT)
    assert torch.equal(found[1][1], found[0][1])
    with attach(spread, rows[0]):
        alone = spread.generate(**{name: value[:1] for name, value in source.items()}, **settings)
    assert torch.equal(alone, found[1][1][:1, : alone.shape[1]])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients_are_those_of_the_base_in_memory_and_its_weights_stay(
    checkpointing: bool, pair: Any, make_states: Make, make_ids: Make
) -> None:
    known, spread = pair
    states = make_states(known, 3)
    inputs = inputs_of(known, make_ids)
    labels = inputs.get("decoder_input_ids", inputs["input_ids"])
    before = weights_hash(spread)
    assert before == weights_hash(known)
    gradients = []
    for model in (known, spread):
        encoder = PrefixEncoder(states.geometry, states.lengths, dtype=torch.float64)
        reproduce(encoder, states)
        is_spread = model is spread
        plain_head = has_plain_head(model)
        with attach(model, encoder):
            if is_spread and checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
                model.train()
            summed_loss(model, inputs, labels, plain_head=plain_head).backward()
        gradients.append([pair.grad for pair in encoder.states])
    torch.testing.assert_close(gradients[1], gradients[0], **EXACT)
    assert all(float(gradient.abs().max()) > 1e-9 for gradient in gradients[0])
    assert weights_hash(spread) == before


def test_a_head_on_disk_takes_the_plain_path(make_model: Make, folders: Make, tmp_path: Path) -> None:
    spread = AutoModelForCausalLM.from_pretrained(
        folders("llama"), device_map=device_map("llama", "all on disk"), offload_folder=tmp_path, dtype=torch.float64
    )
    assert has_plain_head(make_model("llama"))
    assert not has_plain_head(spread)
    assert weights.input_device(spread) == torch.device("cpu")
    assert spread.device.type == "meta"


def test_a_prefix_starts_from_a_text_read_by_an_offloaded_base(
    make_model: Make, folders: Make, make_ids: Make, tmp_path: Path
) -> None:
    spread = AutoModelForCausalLM.from_pretrained(
        folders("llama"), device_map=device_map("llama", "all on disk"), offload_folder=tmp_path, dtype=torch.float64
    )
    text = make_ids(4)
    for found, expected in zip(
        text_states(spread, text).sites, text_states(make_model("llama"), text).sites, strict=True
    ):
        torch.testing.assert_close(found.key, expected.key, **EXACT)


def test_weights_offloaded_to_memory_are_found_and_a_model_without_weights_is_not_one(
    make_model: Make, make_prefix: Make, make_ids: Make
) -> None:
    model = make_model("llama", fresh=True)
    expected = fingerprint(model)
    offloaded = cpu_offload(make_model("llama", fresh=True), torch.device("cpu"))
    assert weights.is_offloaded(offloaded)
    assert weights.input_device(offloaded) == torch.device("cpu")  # the model's own hook names none
    assert fingerprint(offloaded) == expected
    prefix, ids = make_prefix(model, 3), make_ids(2, 5)
    with attach(model, prefix):
        answer = model(input_ids=ids).logits
    with attach(offloaded, prefix):
        assert torch.equal(offloaded(input_ids=ids).logits, answer)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert not weights.is_offloaded(empty)
    assert inspect_model(empty).geometry == inspect_model(model).geometry
    with pytest.raises(ModelError, match="LlamaForCausalLM: its weight .* holds no numbers; load the model with its"):
        fingerprint(empty)


def test_a_tied_weight_that_accelerate_cannot_bring_back_is_refused(tmp_path: Path) -> None:
    build(ENCODER_DECODERS["t5"]).save_pretrained(tmp_path / "t5")
    places = {"shared": "cpu", "encoder": "disk", "decoder": "disk", "lm_head": "cpu"}
    spread = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5", device_map=places, offload_folder=tmp_path / "off")
    with pytest.raises(UnsupportedModelError, match="offloaded a tied weight .* keep the embeddings, by every name"):
        inspect_model(spread)
