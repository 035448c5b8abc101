"""The house stands as drawn: arrows point down, exports exist, light parts stay light."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import prefixkit

ROOT = Path(__file__).parents[1]


def test_the_layers_hold() -> None:
    code = "import sys; from importlinter.cli import lint_imports_command as lint; sys.exit(lint(['--no-cache']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("name", prefixkit.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(prefixkit, name) is not None


@pytest.mark.parametrize(
    "package", ["config", "data", "export", "injection", "models", "peft", "prefix", "training", "generation"]
)
def test_every_exported_name_exists(package: str) -> None:
    module = import_module(f"prefixkit.{package}")
    for name in getattr(module, "__all__", []):
        assert hasattr(module, name), f"prefixkit.{package}.{name}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'prefixkit' has no attribute 'attatch'"):
        _ = prefixkit.attatch


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("prefixkit", ["torch", "transformers", "pydantic"]),
        ("prefixkit.config", ["torch", "transformers", "datasets"]),
        ("prefixkit.errors", ["torch", "pydantic"]),
        ("prefixkit.files", ["torch"]),
        ("prefixkit.prefix", ["transformers", "datasets"]),
    ],
)
def test_light_parts_import_nothing_heavy(module: str, forbidden: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {forbidden} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_stay_small() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / "src").rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 350
    }
    assert not long


#: What transformers and torch do not document, or say may change.
UNDOCUMENTED = {
    "a submodule": r"(from|import) transformers\.(?!utils import logging|generation.streamers import)",
    "a mask function": r"masking_utils",
    "torch's own": r"torch\._",
    "an attribute of a model": r"(?<!set)_attn_implementation\b|_can_set_attn|_gradient_checkpointing_func|_hf_peft",
}


@pytest.mark.parametrize("what", UNDOCUMENTED)
def test_what_may_change_is_touched_in_compat_alone(what: str) -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "src").rglob("*.py")
        if re.search(UNDOCUMENTED[what], path.read_text(encoding="utf-8"))
    }
    assert found == {"src/prefixkit/compat.py"}


def test_make_runs_both_ends_of_what_transformers_may_be() -> None:
    allowed = re.search(r'"transformers>=(\d+\.\d+),<(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    makefile = (ROOT / "Makefile").read_text()
    assert allowed is not None
    oldest, major, after = allowed.groups()
    assert f"OLDEST := {oldest}.0\n" in makefile
    assert f"NEWEST := {major}.{int(after) - 1}." in makefile


def test_every_name_is_defined() -> None:
    """ruff and mypy are not asked as a rule: to them the axes in a shape's string are names, which nobody defines."""
    command = [sys.executable, "-m", "ruff", "check", "--select", "F821", "--output-format", "json", "."]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    undefined = {each["message"].split("`")[1] for each in json.loads(done.stdout)}
    assert undefined == {"b", "c", "h", "k", "n", "p", "s", "t", "v"}
