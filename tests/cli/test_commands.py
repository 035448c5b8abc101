"""The command line as a person meets it: in a process of its own."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prefixkit.config import dump_recipe, validate_recipe

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    """A recipe that trains in a second."""
    words = "the film was wonderful great dull i loved it and story".split()
    rows = [{"text": " ".join(words[(i + k) % 11] for k in range(4 + i % 7)) + f" {i}", "label": "ab"[i % 2]}
            for i in range(80)]  # fmt: skip
    data = tmp_path / "my reviews.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    values = {
        "name": "tiny",
        "model": {"base": str(tiny_llama_dir), "dtype": "float32"},
        "prefix": {"num_virtual_tokens": 3},
        "data": {"source": str(data), "label_column": "label", "keep_label": "a", "prompt": "the film"},
        "train": {"steps": 3, "batch_size": 4, "evaluate_every": 2, "threads": 1},
        "evaluation": {"samples": 2, "judge": False, "heldout_rows": 4, "contrast_rows": 2, "bootstrap": 100},
        "generation": {"max_new_tokens": 4},
    }
    path = tmp_path / "tiny recipe.yaml"
    path.write_text(dump_recipe(validate_recipe(values), only_changes=True), encoding="utf-8")
    return path


def test_help_is_quick_and_imports_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys, prefixkit.cli.main as m; from prefixkit.cli.failing import run_app; "
        "run_app(m.app, ['--help']); print(*(name in sys.modules for name in ('torch', 'transformers', 'pydantic')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "False False False"
    assert "train" in found.stdout


def test_a_run_leaves_everything_and_can_be_used(run: Run, recipe: Path, tmp_path: Path) -> None:
    trained = run("train", str(recipe), "--json")
    assert trained.returncode == 0, trained.stderr
    folder = tmp_path / "runs" / "tiny"
    left = {path.name for path in folder.iterdir()}
    assert left == {"by_text.json", "metrics.jsonl", "prefix.json", "prefix.safetensors", "recipe.yaml", "report.html",
                    "run.json", "samples.jsonl", "scores.json", "training"}  # fmt: skip
    scores = json.loads((folder / "scores.json").read_text())
    assert json.loads(trained.stdout)["scores"]["heldout_nll"] == scores["heldout_nll"]
    assert {"heldout_nll", "base.heldout_nll", "heldout_nll_negative", "trainable_parameters"} <= scores.keys()
    record = json.loads((folder / "run.json").read_text())
    assert record["base_weights_hash"]["before"] == record["base_weights_hash"]["after"]
    assert record["seconds"] > 0
    assert record["evaluation_seconds"] > 0
    assert record["peak_memory_bytes"] > 1e8

    refused = run("train", str(recipe))
    assert refused.returncode == 1
    assert "exists already; go on with --resume, start again with --overwrite" in refused.stderr
    assert run("train", str(recipe), "--resume").returncode == 0
    changed = run("train", str(recipe), "train.seed=5", "--resume")
    assert "train.seed: the run was started with 0, not 5" in changed.stderr

    shown = run("show", str(folder))
    assert "virtual tokens         3 in 2 layers" in shown.stdout
    first, again = (run("generate", str(folder), "-p", "i loved", "-n", "2", "--json") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout
    assert len(first.stdout.splitlines()) == 2
    streamed = run("generate", str(folder), "-p", "i loved", "--base")
    assert streamed.stdout.count("i loved") == 2
    assert run("evaluate", str(folder), "evaluation.heldout_rows=3").returncode == 0
    diagnosed = run("diagnose", str(folder))
    assert diagnosed.returncode == 0, diagnosed.stderr
    assert diagnosed.stdout.startswith("A token of text gives the prefix ")
    assert f"page: {folder / 'diagnosis.html'}" in diagnosed.stdout
    printed = json.loads(run("diagnose", str(folder), "--rows", "2", "--json").stdout)
    assert printed == json.loads((folder / "diagnosis.json").read_text())
    assert printed["texts"] == 2
    too_long = run("diagnose", str(folder), "--tokens", "100")
    assert too_long.returncode == 1
    assert len(too_long.stderr.strip().splitlines()[-1].split("give at most")) == 2
    assert "only evaluation.* and generation.* can change" in run("evaluate", str(folder), "train.steps=9").stderr


def test_a_dry_run_prints_the_whole_recipe(run: Run) -> None:
    found = run("train", "positive-reviews", "prefix.num_virtual_tokens=50", "--dry-run")
    assert "num_virtual_tokens: 50" in found.stdout
    assert "learning_rate: 0.01\n" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "positive-reviews", "prefix.lenght=3"], "error: prefix.lenght: unknown key"),
        (["train", "positive-review"], 'error: positive-review: no such recipe file; did you mean "positive-reviews"?'),
        (["train", "positive-reviews", "model.base=no-such-model"], "error: no-such-model: "),
        (["show", "nowhere"], "error: nowhere: no such folder; expected an artefact or a finished run"),
        (["diagnose", "nowhere"], "error: nowhere: no such folder; expected an artefact or a finished run"),
        (["inspect", "./nowhere"], "error: ./nowhere: no such folder; give a folder, a .gguf file, a hub id, or"),
        (["generate", "nowhere"], "error: nowhere: no such folder; expected an artefact or a finished run"),
        (["train", "positive-reviews", "data.source=missing.csv"], "error: "),
    ],
)
def test_a_mistake_is_one_line_and_exit_1(run: Run, arguments: list[str], message: str) -> None:
    found = run(*arguments)
    assert found.returncode == 1
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith(message)
    assert "Traceback" not in found.stderr
    assert found.stdout == ""


def test_inspecting_says_whether_a_model_takes_a_prefix(run: Run, tiny_llama_dir: Path, tmp_path: Path) -> None:
    found = run("inspect", str(tiny_llama_dir), "-n", "3")
    assert found.returncode == 0, found.stderr
    assert "2 layers, 4 query heads on 2 KV heads of size 8" in found.stdout
    assert "125 left for text after 3 virtual tokens" in found.stdout
    whole = json.loads(run("inspect", str(tiny_llama_dir), "--json").stdout)
    assert (whole["can_take_prefix"], whole["prefix_parameters"]) == (True, 20 * 64)

    bloom = tmp_path / "bloom"
    bloom.mkdir()
    (bloom / "config.json").write_text(json.dumps({"model_type": "bloom", "n_layer": 1, "n_head": 2}))
    (bloom / "model.safetensors").write_bytes(b"")
    refused = run("inspect", str(bloom), "--json")
    assert refused.returncode == 1
    reason = "BloomForCausalLM: its attention does not go through transformers' attention interface"
    assert refused.stderr.startswith(f"error: {reason}")
    assert len(refused.stderr.splitlines()) == 1
    verdict = json.loads(refused.stdout)
    assert (verdict["can_take_prefix"], verdict["reason"][: len(reason)]) == (False, reason)


def test_debug_shows_the_traceback(run: Run) -> None:
    assert "Traceback" in run("--debug", "show", "nowhere").stderr


def test_recipes_can_be_listed_shown_copied_and_checked(run: Run, tmp_path: Path) -> None:
    assert "positive-reviews" in run("recipes", "list").stdout
    assert run("recipes", "copy", "gpt2-imdb", "mine.yaml").returncode == 0
    assert run("recipes", "show", "gpt2-imdb").stdout == (tmp_path / "mine.yaml").read_text()
    assert "mine.yaml: exists already" in run("recipes", "copy", "gpt2-imdb", "mine.yaml").stderr
    assert run("recipes", "check", "mine.yaml").stdout == "gpt2-imdb: ok\n"


def test_overwriting_spares_a_folder_that_is_no_run(run: Run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "thesis.txt").write_text("years of work")
    found = run("train", str(recipe), "--overwrite")
    assert "is not a run folder, it holds thesis.txt; not overwriting it" in found.stderr
    assert (tmp_path / "runs" / "tiny" / "thesis.txt").exists()


def test_sigterm_is_taken_as_ctrl_c_which_saves_a_checkpoint_and_exits_130(recipe: Path, tmp_path: Path) -> None:
    """Even where Ctrl-C is ignored, as in a job that a shell put into the background."""
    own = [sys.executable, "-m", "prefixkit", "train", str(recipe), "train.steps=100000", "train.patience=null"]
    command = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *own]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "go on with --resume" in talk
    assert list((tmp_path / "runs" / "tiny" / "training" / "checkpoints").glob("checkpoint-*"))


def test_the_lab_pages_recipe_runs_on_a_tiny_gpt2(run: Run, tiny_gpt2_dir: Path, recipe: Path, tmp_path: Path) -> None:
    found = run(
        "train", "gpt2-imdb", f"model.base={tiny_gpt2_dir}", f"data.source={tmp_path / 'my reviews.jsonl'}",
        "data.keep_label=a", "data.min_words=1", "train.steps=2", "train.threads=1", "evaluation.samples=0",
        "evaluation.heldout_rows=3", "evaluation.contrast_rows=2", "evaluation.bootstrap=100", "train.batch_size=2",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    card = json.loads((tmp_path / "runs" / "gpt2-imdb" / "prefix.json").read_text())
    assert card["sites"][0]["num_virtual_tokens"] == 20
    assert card["training"]["trained_parameters"] == 20 * 768 + (768 * 768 + 768) + (768 + 1) * 2 * 2 * 32
