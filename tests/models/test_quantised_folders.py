"""Saved quantised bases load as they were, or one line says what is missing."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from injection.quantised import KINDS, load, needs, plain
from prefixkit.errors import ModelError
from prefixkit.models import load_base_model
from prefixkit.models.fingerprint import fingerprint


@pytest.fixture
def save(tmp_path: Path, tiny_tokenizer: Any) -> Callable[..., Path]:
    def make(kind: str, family: str) -> tuple[Path, Any]:
        needs(kind)
        plain(family).save_pretrained(tmp_path / "plain")
        model = load(tmp_path / "plain", family, quantization_config=KINDS[kind]())
        where = tmp_path / "quantised base"
        model.save_pretrained(where)
        tiny_tokenizer.save_pretrained(where)
        return where, model

    return make


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_quantised_base_loads_as_it_was(kind: str, family: str, save: Any) -> None:
    where, model = save(kind, family)
    base = load_base_model(str(where), dtype="float32")
    assert fingerprint(base.model) == fingerprint(model)
    inputs = {"input_ids": torch.arange(3, 9)[None]}
    if family == "t5":
        inputs["decoder_input_ids"] = torch.arange(3, 6)[None]
    for module in model.modules():  # the loaded base keeps bitsandbytes from rearranging; so must the other
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    assert torch.equal(base.model(**inputs).logits, model(**inputs).logits)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_torchao_weights_are_not_mixed_with_another_number_format(save: Any) -> None:
    where, _ = save("torchao int8", "llama")
    message = f"{where}: its weights were quantised to compute in float32; set model.dtype=float32"
    with pytest.raises(ModelError) as caught:
        load_base_model(str(where), dtype="bfloat16")
    assert str(caught.value) == message


@pytest.mark.parametrize(("library", "settings"), [
    ("torchao", {"quant_method": "torchao", "quant_type": {"default": {
        "_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}}}),
    ("bitsandbytes", {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
])  # fmt: skip
def test_a_missing_library_is_named(
    library: str, settings: dict[str, Any], tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = Path(shutil.copytree(tiny_llama_dir, tmp_path / "a copy"))
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    monkeypatch.setitem(sys.modules, library, None)
    for check in ("is_bitsandbytes_available", "is_torchao_available"):
        for module in [m for name, m in sys.modules.items() if name.startswith("transformers.quantizers") and m]:
            if hasattr(module, check):
                monkeypatch.setattr(module, check, lambda *_: False)
    with pytest.raises(ModelError) as caught:
        load_base_model(str(where))
    expected = f"its weights need {library}, which is not installed or too old; pip install 'prefixkit[quantised]'"
    assert str(caught.value) == f"{where}: {expected}"


def test_any_other_missing_library_is_reported_in_one_line(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefixkit.models import base

    def fail(*args: Any, **options: Any) -> None:
        raise ImportError("Loading a GPTQ quantized model requires gptqmodel")

    monkeypatch.setattr(base.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelError, match=r"library that is not installed \(Loading a GPTQ .* gptqmodel\); install it"):
        load_base_model(str(tiny_llama_dir))
