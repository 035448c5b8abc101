"""Prefixes to PEFT and back on the command line, in processes of their own."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from prefixkit import Prefix, attach, load_base_model
from prefixkit.models.fingerprint import fingerprint
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import BaseCard, PrefixStates

Run = Callable[..., subprocess.CompletedProcess[str]]
IDS = torch.tensor([[1, 9, 30, 4, 50]])


@pytest.fixture
def artefact(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    """A prefix that somebody made by hand: it knows its base model and no recipe."""
    model = load_base_model(str(tiny_llama_dir), dtype="float32").model
    geometry = inspect_model(model).geometry
    states = PrefixStates.from_rows(geometry, torch.randn(3, geometry.numbers_per_token))
    Prefix.from_states(states, base=BaseCard(id=str(tiny_llama_dir), fingerprint=fingerprint(model))).save(
        tmp_path / "my prefix"
    )
    return tmp_path / "my prefix"


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    """What PEFT itself saves."""
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama_dir),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.save_pretrained(tmp_path / "peft's")
    return tmp_path / "peft's"


def test_an_artefact_goes_to_peft(run: Run, artefact: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    done = run("export", "peft", str(artefact), "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"folder": "out", "base": str(tiny_llama_dir), "num_virtual_tokens": 3}
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).double().eval()
    with attach(model, Prefix.load(artefact)):
        ours = model(IDS).logits
    theirs = PeftModel.from_pretrained(model, tmp_path / "out")(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)

    refused = run("export", "peft", str(artefact), "out")
    assert refused.returncode == 1
    assert refused.stderr == "error: out: exists already; replace it with --overwrite, or choose another folder\n"
    again = run("export", "peft", str(artefact), "out", "--overwrite", "--base", str(tiny_llama_dir))
    assert again.stdout == (f'out: load it with PeftModel.from_pretrained(base, "out"), base being {tiny_llama_dir}\n')


def test_pefts_checkpoint_becomes_an_artefact_that_generates(
    run: Run, checkpoint: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    done = run("import", "peft", str(checkpoint), "out")
    assert done.returncode == 0, done.stderr
    prefix = Prefix.load(tmp_path / "out")
    assert done.stdout == f"out: 4 virtual tokens for {tiny_llama_dir}, content {prefix.card.content_hash[:12]}\n"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).double().eval()
    with attach(model, prefix):
        ours = model(IDS).logits
    theirs = PeftModel.from_pretrained(model, checkpoint)(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert prefix.card.base.fingerprint == fingerprint(model)

    written = run("generate", "out", "-p", "the movie", "--json")
    assert json.loads(written.stdout)["prompt"] == "the movie", written.stderr
    assert "exists already" in run("import", "peft", str(checkpoint), "out").stderr
    card = run("import", "peft", str(checkpoint), "out", "--overwrite", "--base", str(tiny_llama_dir), "--json")
    assert json.loads(card.stdout) == prefix.card.model_dump(mode="json")


def test_mistakes_are_one_line_and_write_nothing(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    config = checkpoint / "adapter_config.json"
    config.write_text(config.read_text().replace("PREFIX_TUNING", "LORA"))
    found = run("import", "peft", str(checkpoint), "out")
    assert found.returncode == 1
    assert found.stderr.startswith(f"error: {config}: peft_type: expected PREFIX_TUNING, got LORA")
    assert len(found.stderr.splitlines()) == 1
    assert "no such folder; expected an artefact or a finished run" in run("export", "peft", "nowhere", "out").stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["export", "import"])
def test_help_names_the_formats_without_loading_torch(command: str) -> None:
    code = (
        "import sys, prefixkit.cli.main as m; from prefixkit.cli.failing import run_app; "
        f"run_app(m.app, ['{command}', 'peft', '--help']); run_app(m.app, ['{command}', '--help']); "
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
    assert "--overwrite" in found.stdout
    assert "peft" in found.stdout
