"""Prefixes from folder to folder: which base model is taken, and what is refused before anything is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixkit import Prefix, load_base_model
from prefixkit.errors import ArtefactError, ExportError, ModelError, PrefixkitError
from prefixkit.lab.interchange import export_peft, import_peft
from prefixkit.lab.run.loaded_run import load_run
from prefixkit.models.fingerprint import fingerprint
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import BaseCard, PrefixStates


@pytest.fixture
def artefact(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    """A prefix that somebody made by hand: it knows its base model and no recipe."""
    model = load_base_model(str(tiny_llama_dir), dtype="float32").model
    geometry = inspect_model(model).geometry
    states = PrefixStates.from_rows(geometry, torch.randn(3, geometry.numbers_per_token))
    base = BaseCard(id=str(tiny_llama_dir), revision="0.1", fingerprint=fingerprint(model))
    Prefix.from_states(states, base=base).save(tmp_path / "made")
    return tmp_path / "made"


@pytest.fixture
def checkpoint(artefact: Path, tmp_path: Path) -> Path:
    export_peft(artefact, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_the_base_model_is_the_one_the_folder_names(
    artefact: Path, checkpoint: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    made = Prefix.load(artefact)
    assert load_run(artefact)[0].id == str(tiny_llama_dir)
    assert json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tiny_llama_dir
    )
    back = import_peft(checkpoint, tmp_path / "back")
    assert back.card == made.card
    assert torch.equal(back.states.to_rows(), made.states.to_rows())
    given = import_peft(checkpoint, tmp_path / "given", base=str(tiny_llama_dir)).card.base
    assert given.revision is None  # a folder has none
    assert given.fingerprint == made.card.base.fingerprint


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"peft_type": "LORA"}, {}, ArtefactError, "peft_type: expected PREFIX_TUNING, got LORA"),
        (
            {"base_model_name_or_path": None},
            {},
            ArtefactError,
            "does not say which base model it belongs to; give it with",
        ),
        ({"base_model_name_or_path": "./gone"}, {}, ModelError, "./gone: no such folder"),
        ({}, {"base": "gpt2"}, ArtefactError, "token_dim: the checkpoint has 16, this model 32; load"),
        ({}, {"revision": "main"}, ModelError, "is no hub model; leave the revision out, got 'main'"),
    ],
)
def test_an_import_that_fails_writes_nothing(
    changes: dict[str, Any],
    options: dict[str, str],
    error: type[PrefixkitError],
    message: str,
    checkpoint: Path,
    tiny_gpt2_dir: Path,
    tmp_path: Path,
) -> None:
    path = checkpoint / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if "base" in options:
        options = {"base": str(tiny_gpt2_dir)}
    with pytest.raises(error, match=message):
        import_peft(checkpoint, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_export_that_fails_writes_nothing(artefact: Path, tiny_gpt2_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="has another geometry than this model; give its base model"):
        export_peft(artefact, tmp_path / "out", base=str(tiny_gpt2_dir))
    with pytest.raises(ArtefactError, match="no such folder; expected an artefact or a finished run"):
        export_peft(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_taken_folder_is_refused_before_the_base_model_is_loaded(
    artefact: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefixkit.lab import interchange

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded a model")

    monkeypatch.setattr(interchange, "load_base_model", fail)
    monkeypatch.setattr(interchange, "load_run", fail)
    with pytest.raises(ExportError, match="checkpoint: exists already; replace it with --overwrite"):
        export_peft(artefact, checkpoint)
    with pytest.raises(ExportError, match="made: exists already; replace it with --overwrite"):
        import_peft(checkpoint, artefact)
    with pytest.raises(ExportError, match="checkpoint: holds adapter_config.json, which is not ours to overwrite"):
        import_peft(checkpoint, checkpoint, overwrite=True)
