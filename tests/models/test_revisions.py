"""A hub model is loaded at one commit, and the commit is kept; a hub's cache on disk stands in for the hub."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

import processes
from prefixkit.cli.main import main
from prefixkit.errors import ModelError
from prefixkit.export import to_peft
from prefixkit.models import load_base_model
from prefixkit.models.fingerprint import fingerprint
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import BaseCard, Prefix, PrefixStates

FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path: Path, tiny_llama_dir: Path, make_tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds org/tiny at two commits, of which main is the first and v2 the second."""
    repository = tmp_path / "hub" / "models--org--tiny"
    for commit, seed in ((FIRST, 0), (SECOND, 1)):
        shutil.copytree(tiny_llama_dir, repository / "snapshots" / commit)
        make_tiny_llama(seed).save_pretrained(repository / "snapshots" / commit)
    (repository / "snapshots" / SECOND / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(FIRST)
    (repository / "refs" / "v2").write_text(SECOND)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def main_at_hub() -> None:
    """Run the command line with the environment's cache, which huggingface_hub looks up when it is imported."""
    huggingface_hub.constants.HF_HUB_CACHE = os.environ["HF_HUB_CACHE"]
    main()


@pytest.mark.parametrize(("asked", "commit", "licence"), [(None, FIRST, "unknown"), ("v2", SECOND, "mit"),
                                                          (SECOND, SECOND, "mit")])  # fmt: skip
def test_the_commit_and_its_licence_are_kept(
    hub: Path, make_tiny_llama: Any, asked: str | None, commit: str, licence: str
) -> None:
    base = load_base_model("org/tiny", revision=asked, dtype="float32")
    assert (base.revision, base.licence) == (commit, licence)
    expected = make_tiny_llama({FIRST: 0, SECOND: 1}[commit]).lm_head.weight
    assert torch.equal(base.model.lm_head.weight, expected)


def test_a_revision_the_cache_does_not_know_is_refused_in_one_line(hub: Path) -> None:
    with pytest.raises(ModelError, match="org/tiny: .*not in the local hub cache") as caught:
        load_base_model("org/tiny", revision="v3")
    assert "\n" not in str(caught.value)


def test_a_prefix_imported_at_a_revision_is_used_at_it(hub: Path, tmp_path: Path) -> None:
    model = load_base_model("org/tiny", revision="v2", dtype="float32").model
    geometry = inspect_model(model).geometry
    rows = torch.randn(3, geometry.numbers_per_token)
    card = BaseCard(id="org/tiny", fingerprint=fingerprint(model))
    to_peft(Prefix.from_states(PrefixStates.from_rows(geometry, rows), base=card), tmp_path / "checkpoint", model)

    def prefixkit(*arguments: str) -> str:
        done = processes.run(main_at_hub, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for out, more in (("named", []), ("given", ["--base", "org/tiny"])):
        prefixkit("import", "peft", "checkpoint", out, "--revision", "v2", *more)
        assert json.loads((tmp_path / out / "prefix.json").read_text())["base"]["revision"] == SECOND
        assert prefixkit("generate", out, "-p", "the film", "--json")
