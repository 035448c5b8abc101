"""A LoRA goes to PEFT's own format: PEFT loads it and answers the same, or it is refused."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from conformance.encoder_families import ENCODER_DECODERS, ENCODERS
from conformance.encoder_families import build as build_encoder
from prefixkit.config import MethodConfig
from prefixkit.errors import BaseMismatchError, ExportError
from prefixkit.export import to_peft
from prefixkit.injection import attach
from prefixkit.methods import build_delta
from prefixkit.models.fingerprint import fingerprint
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import BaseCard, Head, HeadKind, Prefix, PrefixStates

Make = Callable[..., Any]


def make_lora(model: PreTrainedModel, *, states: PrefixStates | None = None, **settings: Any) -> Prefix:
    config = MethodConfig.model_validate({"kind": "lora", "rank": 2} | settings)
    delta = build_delta(model, config, torch.Generator().manual_seed(0))
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for number in delta.numbers:
            number.add_(0.3 * torch.randn(number.shape, generator=dice, dtype=number.dtype))
    base = BaseCard(id="org/tiny", revision="v1", fingerprint=fingerprint(model))
    states = states or PrefixStates.empty(inspect_model(model).geometry)
    return Prefix.from_states(states, base=base, deltas=[delta.materialise()])


def assert_same_answers(model: PreTrainedModel, lora: Prefix, folder: Path, inputs: dict[str, Any]) -> PeftModel:
    plain = model(**inputs).logits
    with attach(model, lora):
        expected = model(**inputs).logits
    assert (expected - plain).abs().max() > 1e-3
    to_peft(lora, folder, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of what it does not find, or corrects
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)  # merging is meant
        theirs = PeftModel.from_pretrained(model, folder)
    torch.testing.assert_close(theirs(**inputs).logits, expected, rtol=0, atol=1e-10)
    return theirs


@pytest.mark.parametrize(
    ("family", "settings", "targets"),
    [
        ("gpt2", {}, ["c_attn"]),
        ("gpt2", {"targets": ["c_attn", "c_fc", "mlp.c_proj"], "alpha": 3.5}, None),
        ("llama", {"dropout": 0.1}, ["q_proj", "v_proj"]),
        ("llama", {"targets": ["model.layers.1.mlp.down_proj"]}, ["model.layers.1.mlp.down_proj"]),
        ("llama", {"targets": ["embed_tokens", "lm_head", "o_proj"]}, ["embed_tokens", "lm_head", "o_proj"]),
        ("gemma", {"targets": ["embed_tokens", "k_proj"]}, ["embed_tokens", "k_proj"]),  # tied to the output
        ("opt", {}, ["q_proj", "v_proj"]),
        ("gpt-neox", {}, ["query_key_value"]),
    ],
)
def test_peft_loads_a_lora_and_answers_the_same(
    family: str, settings: dict[str, Any], targets: list[str] | None, make_model: Make, tmp_path: Path
) -> None:
    model = make_model(family)
    lora = make_lora(model, **settings)
    ids = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(2))
    theirs = assert_same_answers(model, lora, tmp_path / "out", {"input_ids": ids})
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["revision"], config["r"]) == ("org/tiny", "v1", 2)
    assert config["lora_alpha"] == settings.get("alpha", 4)
    assert config["lora_dropout"] == settings.get("dropout", 0.0)
    if targets is None:  # attn.c_proj ends as mlp.c_proj does
        parts = ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")
        targets = [f"transformer.h.{layer}.{part}" for layer in range(3) for part in parts]
    assert config["target_modules"] == targets
    assert theirs.peft_config["default"].inference_mode
    shapes = {name: tuple(number.shape) for name, number in lora.deltas[0].tensors.items()}
    found = {name.removeprefix("base_model.model."): number for name, number in theirs.named_parameters()}
    assert {name.replace(".default", ""): tuple(number.shape) for name, number in found.items()
            if ".lora_" in name} == shapes  # fmt: skip


@pytest.mark.parametrize("kind", ["t5", "bart", "bert"])
def test_loras_of_encoders_go_to_peft_too(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    is_encoder = kind in ENCODERS
    model = build_encoder(ENCODERS[kind], AutoModelForMaskedLM) if is_encoder else build_encoder(ENCODER_DECODERS[kind])
    inputs = {"input_ids": torch.tensor([[5, 9, 30, 4]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    inputs |= {} if is_encoder else {"decoder_input_ids": torch.tensor([[2, 7, 8]])}
    theirs = assert_same_answers(model, make_lora(model), tmp_path / "out", inputs)
    assert theirs.peft_config["default"].task_type == (None if is_encoder else "SEQ_2_SEQ_LM")


def test_float32_and_bfloat16_base_models_answer_the_same(make_model: Make, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model("llama", dtype=dtype)
        lora, ids = make_lora(model), torch.tensor([[5, 9, 30, 4]])
        with attach(model, lora):
            expected = model(ids).logits
        to_peft(lora, tmp_path / str(dtype), model)
        assert torch.equal(PeftModel.from_pretrained(model, tmp_path / str(dtype))(ids).logits, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("prefix", ExportError,
         "PEFT's prefix format cannot say lora, which was trained with this artefact; export what is left without it"
         ': prefix.without("lora")'),
        ("without prefix", ExportError,
         "PEFT's LoRA format cannot say position_offset 3, at which the text stood beside a prefix; train a LoRA alone "
         "for it"),
        ("head", ExportError,
         "PEFT's LoRA format cannot say the head that was trained with this LoRA; attach the artefact, and read it "
         "with prefixkit.classify or prefixkit.tag"),
        ("adapter", ExportError, "adapter: cannot be exported to PEFT's formats; a prefix can, and a LoRA alone"),
        ("layers", ExportError,
         "lora: model.layers.2.self_attn.q_proj is no layer of this model; give the base model it was trained on"),
        ("base", BaseMismatchError, None),
    ],
)  # fmt: skip
def test_what_cannot_be_exact_is_refused_and_writes_nothing(
    change: str, error: type[Exception], message: str | None, make_model: Make, tmp_path: Path
) -> None:
    model, other = make_model("llama"), make_model("llama", seed=1)
    geometry = inspect_model(model).geometry
    states = PrefixStates.from_rows(geometry, torch.randn(3, geometry.numbers_per_token).double())
    lora = make_lora(model, states=states if "prefix" in change else None)
    if change == "without prefix":
        lora = lora.without("prefix")
    if change == "head":
        head = Head(HeadKind.SEQUENCE, ("bad", "good"), torch.ones(2, 32), torch.zeros(2))
        lora = Prefix.from_states(lora.states, base=lora.card.base, deltas=lora.deltas, head=head)
    if change == "adapter":
        delta = build_delta(model, MethodConfig.model_validate("adapter"), torch.Generator().manual_seed(0))
        lora = Prefix.from_states(lora.states, base=lora.card.base, deltas=[delta.materialise()])
    if change == "layers":
        lora = Prefix.from_states(lora.states, base=BaseCard(id="any"), deltas=lora.deltas)
        other = make_model("llama", num_hidden_layers=2)
    with pytest.raises(error) as caught:
        to_peft(lora, tmp_path / "out", other if change in ("base", "layers") else model)
    assert message is None or str(caught.value) == message
    assert not (tmp_path / "out").exists()


def test_peft_reads_what_it_would_have_written_itself(make_model: Make, tmp_path: Path) -> None:
    """The same keys as in a checkpoint of PEFT's own, so that what else reads those reads ours."""
    model = make_model("llama")
    lora = make_lora(model)
    to_peft(lora, tmp_path / "ours", model)
    theirs = get_peft_model(make_model("llama"), LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path / "theirs")
    from safetensors.torch import load_file

    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")]
    said = {"base_model_name_or_path", "revision", "target_modules"}
    assert {key: configs[1][key] for key in configs[0].keys() - said} == {
        key: configs[0][key] for key in configs[0].keys() - said
    }
    assert sorted(configs[1]["target_modules"]) == configs[0]["target_modules"]
