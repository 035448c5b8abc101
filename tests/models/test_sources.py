"""A base model's name is understood without loading anything."""

import pytest

from prefixkit.errors import ModelError
from prefixkit.models.sources import Source, SourceKind, packaged_hint, resolve_source


def test_packaged_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_source("smollm2-135m") == Source("smollm2-135m", SourceKind.PACKAGED)


def test_existing_folder_wins_over_a_hub_id(tiny_gpt2_dir, monkeypatch):
    monkeypatch.chdir(tiny_gpt2_dir.parent)
    tiny_gpt2_dir.with_name("gpt2").symlink_to(tiny_gpt2_dir)
    source = resolve_source("gpt2")
    tiny_gpt2_dir.with_name("gpt2").unlink()
    assert source.kind is SourceKind.FOLDER
    assert resolve_source("gpt2") == Source("gpt2", SourceKind.HUB)


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3.2-1B", "a/b_c.d-e"])
def test_hub_ids(name):
    assert resolve_source(name) == Source(name, SourceKind.HUB)


def test_gguf_file_is_recognised_in_any_case(tmp_path):
    path = tmp_path / "Model.GGUF"
    path.touch()
    assert resolve_source(str(path)) == Source(str(path), SourceKind.GGUF, path)


@pytest.mark.parametrize("name", ["./x", "../x", "~nobody-here/x", "/x/y", "a/b/c", "two words", "-x", ""])
def test_path_that_does_not_exist_is_not_taken_to_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # beside which there is no x
    with pytest.raises(ModelError) as caught:
        resolve_source(name)
    assert str(caught.value) == (
        f"{name}: no such folder; give a folder, a .gguf file, a hub id,"
        " or a packaged model (smollm2-135m, all-minilm-l6-v2)"
    )


def test_messages_for_files(tmp_path):
    with pytest.raises(ModelError, match=r"^x/model.gguf: no such file; give the path of a .gguf file$"):
        resolve_source("x/model.gguf")
    text = tmp_path / "notes.txt"
    text.touch()
    with pytest.raises(ModelError, match=r"a file, but not a .gguf file; give a model's folder, or a .gguf file$"):
        resolve_source(str(text))


def test_folder_with_a_gguf_file_points_at_it(tmp_path):
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ModelError) as caught:
        resolve_source(str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: no config.json in this folder; give the file itself, {tmp_path / 'm.gguf'}"
    )


def test_folder_of_a_prefix_is_not_a_base_model(tmp_path):
    (tmp_path / "prefix.json").write_text("{}")
    with pytest.raises(ModelError, match="this folder holds an artefact, not a base model; give the model it was"):
        resolve_source(str(tmp_path))


def test_hint_only_for_close_names():
    assert packaged_hint("SmolLM2-135M") == '; did you mean "smollm2-135m"?'
    assert packaged_hint("gpt2") == ""
