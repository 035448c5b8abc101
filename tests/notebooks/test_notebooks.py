"""The notebooks as they are committed: executed, readable on their own, and the same code in every language.

Whether they run is asked by `make test-notebooks`, which executes them at tiny size.
"""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NAMES = ["01-Setup", "02-Train", "03-Inference", "04-Inside", "05-Compare", "06-ManyTasks"]
TRANSLATED = ["01-Setup", "02-Train", "03-Inference"]
PATHS = [FOLDER / f"{name}.ipynb" for name in NAMES] + [FOLDER / "zh-TW" / f"{name}.ipynb" for name in TRANSLATED]
MOST_BYTES = 400_000

every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(FOLDER)))


def load_execute() -> ModuleType:
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXECUTE = load_execute()


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in EXECUTE.read(path)["cells"] if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_these_are_all_there_are() -> None:
    assert sorted(FOLDER.rglob("*.ipynb")) == sorted(PATHS)


@every_notebook
def test_it_was_executed_from_top_to_bottom_on_a_fresh_kernel(path: Path) -> None:
    assert [cell["execution_count"] for cell in cells(path, "code")] == list(range(1, 1 + len(cells(path, "code"))))


@every_notebook
def test_its_outputs_are_saved_and_none_is_an_error_or_a_warning(path: Path) -> None:
    outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert len([output for output in outputs if "image/svg+xml" in output.get("data", {})]) >= 3
    assert path.stat().st_size < MOST_BYTES


@every_notebook
def test_it_names_no_place_on_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    folders = "tmp|root|home|work|usr|var|opt|etc|mnt|media|Users|Volumes"
    assert re.findall(rf"(?<![\w.<:/])/(?:{folders})\b|[A-Z]:\\\\| at 0x", text) == []


@every_notebook
def test_every_cell_has_an_id_of_its_own(path: Path) -> None:
    notebook = EXECUTE.read(path)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert notebook["metadata"] == EXECUTE.METADATA
    assert {tuple(cell["metadata"]) for cell in notebook["cells"]} == {()}


@every_notebook
def test_every_section_ends_in_an_assertion_that_can_fail(path: Path) -> None:
    """From one heading to the next, the last code cell asserts something."""
    last: dict[str, str] = {}
    heading = ""
    for cell in EXECUTE.read(path)["cells"]:
        if cell["cell_type"] == "markdown":
            heading = next((line for line in source(cell).splitlines() if line.startswith("## ")), heading)
        else:
            last[heading] = source(cell)
    assert len(last) >= 4
    assert [heading for heading, code in last.items() if "assert " not in code] == []
    assert [code for code in last.values() if re.search(r"assert (True|1)\b", code)] == []


@every_notebook
def test_it_asks_questions_and_hides_the_answers(path: Path) -> None:
    text = "\n".join(map(source, cells(path, "markdown")))
    assert text.count("<details><summary>") == text.count("</details>") >= 4
    assert text.count("**Question.**") + text.count("**問題：**") == text.count("<details>")


@every_notebook
def test_its_links_lead_somewhere(path: Path) -> None:
    text = "\n".join(map(source, cells(path, "markdown")))
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("name", TRANSLATED)
def test_both_languages_have_the_same_code_and_outputs(name: str) -> None:
    english, chinese = FOLDER / f"{name}.ipynb", FOLDER / "zh-TW" / f"{name}.ipynb"
    assert cells(chinese, "code") == cells(english, "code")
    assert EXECUTE.with_code_of(EXECUTE.read(english), EXECUTE.read(chinese)) == EXECUTE.read(chinese)
    own = [source(cell) for cell in cells(chinese, "markdown")]
    assert all(re.search(r"[\u4e00-\u9fff]", text) for text in own)
    assert not set(own) & {source(cell) for cell in cells(english, "markdown")}


def test_an_edition_with_other_cells_is_refused() -> None:
    english = {"cells": [{"id": "a", "cell_type": "code"}, {"id": "b", "cell_type": "markdown"}]}
    shorter = [{"id": "a", "cell_type": "code"}]
    for other in (shorter, [*shorter, {"id": "c", "cell_type": "markdown"}]):
        with pytest.raises(ValueError, match="the editions differ in their cells: b against"):
            EXECUTE.with_code_of(english, {"cells": other})


def test_what_changes_from_run_to_run_is_not_saved() -> None:
    picture = {"image/svg+xml": ["<svg/>"], "text/plain": ["<Figure size 760x320 with 1 Axes>"]}
    words = {"text/plain": ["<matplotlib.legend.Legend at 0x7f00>"]}
    cell = {
        "cell_type": "code",
        "metadata": {"execution": {"iopub.execute_input": "2020-01-01"}},
        "outputs": [
            {"output_type": "execute_result", "data": words, "metadata": {}, "execution_count": 1},
            {"output_type": "display_data", "data": picture, "metadata": {"needs_background": "light"}},
        ],
    }
    kept = EXECUTE.tidied(cell)
    alone = cell | {"outputs": [{"output_type": "execute_result", "data": {"text/plain": ["4"]}, "metadata": {}}]}
    assert EXECUTE.tidied(alone)["outputs"] == alone["outputs"]
    assert kept["metadata"] == {}
    assert kept["outputs"] == [{"output_type": "display_data", "data": {"image/svg+xml": ["<svg/>"]}, "metadata": {}}]


def test_recorded_times_are_of_notebooks_that_trained_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, record = tmp_path / "runs", tmp_path / "notebooks.json"
    runs.mkdir()
    monkeypatch.setattr(EXECUTE, "RUNS", runs)
    monkeypatch.setattr(EXECUTE, "RECORD", record)
    monkeypatch.setattr(EXECUTE, "share", lambda path: [])
    monkeypatch.setattr(EXECUTE, "execute", lambda path: 12.34 if not runs.exists() else 0.0)
    assert EXECUTE.main(["01-Setup", "02-Train"], is_recorded=True) == 0
    found = json.loads(record.read_text(encoding="utf-8"))
    assert found["seconds"] == {"01-Setup": 12.3, "02-Train": 12.3}
    assert found["machine"]["cores"] >= 1
    record.unlink()
    assert EXECUTE.main(["01-Setup"], is_recorded=False) == 0
    assert not record.exists()


def test_each_took_less_than_five_minutes_where_it_was_timed() -> None:
    seconds = EXECUTE.read(EXECUTE.RECORD)["seconds"]
    assert sorted(seconds) == sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    assert max(seconds.values()) < 300
