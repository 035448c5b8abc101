"""Pictures for notebooks stand alone: own colours, own size, the same bytes each time."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from prefixkit.errors import EvaluationError
from prefixkit.lab import pictures
from prefixkit.lab.diagnosis.run import diagnose_run
from prefixkit.lab.pages.plots import STYLE
from prefixkit.lab.run.run import Run


def test_a_runs_losses_are_drawn_with_the_step_that_was_kept(run: Run) -> None:
    picture = pictures.losses(run)
    svg = picture._repr_svg_()
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert float(root.get("width", "0")) > 400
    assert "best " in svg
    assert "var(" not in svg
    assert pictures.losses(run) == picture


def test_a_run_without_losses_is_refused(run: Run) -> None:
    (run.folder / "metrics.jsonl").unlink()
    with pytest.raises(EvaluationError, match="holds no losses to draw"):
        pictures.losses(run)


def test_a_diagnosis_is_drawn_as_the_page_draws_it(run: Run, tmp_path: Path) -> None:
    found = diagnose_run(run.folder, rows=4, out=tmp_path / "found").diagnosis
    drawn = [draw(found).svg for draw in (pictures.heads, pictures.dilution, pictures.virtual_tokens)]
    assert all("virtual token" in svg or "attention on the prefix" in svg for svg in drawn)
    assert len({ElementTree.fromstring(svg).get("aria-label") for svg in drawn}) == 3


def test_every_colour_is_one_that_can_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, object] = {}
    monkeypatch.setattr(pictures, "rcParams", settings)
    inline = pytest.importorskip("matplotlib_inline.backend_inline")
    monkeypatch.setattr(inline, "set_matplotlib_formats", lambda *_, **__: None)
    pictures.use_style()
    assert settings.keys() > STYLE.keys()
    assert not [value for value in settings.values() if re.match(r"#01020\d", str(value))]
    assert all(re.fullmatch(r"#[0-9a-f]{6}", colour) for colour in pictures.COLOURS.values())
