"""What a study's page and the page over all studies say; they read the results alone."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from made_up import arm, outcome, result
from prefixkit.config import ClaimConfig
from prefixkit.lab.study.index import write_index
from prefixkit.lab.study.measures import DIVERGED, known_measures
from prefixkit.lab.study.page import render_study, write_page
from prefixkit.lab.study.plots import layers_plot, measure_plot, rates_plot
from prefixkit.lab.study.results import Tried, write_results

CLAIMS = [
    ClaimConfig(source="a paper", says="Short beats long.", test="better", arms=["short", "long"]),
    ClaimConfig(source="a page", says="It needs a GPU.", test="none", why="there is none here"),
]


def outcomes(*losses: float):  # type: ignore[no-untyped-def]
    return [
        outcome({"heldout_nll": loss, "sentiment_accuracy": 0.9, DIVERGED: 0.0}, samples=(f"text of {loss} <b>",),
                others={"base.heldout_nll": 4.0} if place == 0 else {})
        for place, loss in enumerate(losses)
    ]  # fmt: skip


@pytest.fixture
def found():  # type: ignore[no-untyped-def]
    tried = (Tried(0.3, 3.5, None, False), Tried(1.0, 3.2, None, False), Tried(3.0, None, "step 3: loss is nan", True))
    arms = [
        arm("short", [], outcomes=outcomes(3.0, 3.1, 3.05), x=5.0, tried=tried, at_edge=True),
        arm("long", [], outcomes=[*outcomes(3.3, 3.4), outcome({DIVERGED: 1.0}, error="step 9: loss is nan")], x=50.0),
    ]
    claimed = {"source": "a page", "values": {"short": {"sentiment_accuracy": 0.853, "seconds": 720.0}}}
    return result(arms, CLAIMS, axis="virtual tokens", claimed=claimed)


def test_the_page_says_what_was_claimed_measured_and_lost(found) -> None:  # type: ignore[no-untyped-def]
    page = render_study(found)
    for words in (
        "Short beats long.", "not decided here", "there is none here", "not testable here", "3.050", "[85.3%]",
        "[720 s]",         "2 of 3, 1 diverged", "long, seed 2", "step 9: loss is nan", "short, rate x3", "at the edge",
        "text of 3.0 &lt;b&gt;", "base model", "abacus", "2.13.0",
    ):  # fmt: skip
        assert words in page, words
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_baselines_of_several_recipes_stand_apart(found) -> None:  # type: ignore[no-untyped-def]
    short, long = found.arms
    first, *others = long.trials
    measured = replace(first, outcome=replace(first.outcome, others={"base.heldout_nll": 5.25}))
    arms = (replace(short, recipe="a"), replace(long, recipe="b", trials=(measured, *others)))
    several = replace(found, arms=arms)
    page = " ".join(re.sub(r"<[^>]+>", " ", render_study(several)).split())
    assert "a: base model 4.000" in page
    assert "b: base model 5.250" in page
    assert "recipe a, b" in page
    both = [measure_plot(each, known_measures()["heldout_nll"], name="plot") for each in (found, several)]
    assert ["base model" in (plot or "") for plot in both] == [True, False]  # there is no line for all arms


def test_a_tiny_run_and_mixed_versions_say_so(found) -> None:  # type: ignore[no-untyped-def]
    other = outcome({"heldout_nll": 3.0}, versions={"torch": "1.0", "prefixkit": "0.1.0"})
    mixed = result([*found.arms, arm("other", [], outcomes=[other])], [], size="tiny")
    page = render_study(mixed)
    assert "several versions of torch (1.0, 2.13.0)" in page
    assert "its numbers mean nothing" in page
    assert "several versions" not in render_study(found)


def test_pictures_show_every_arm_and_the_baselines(found) -> None:  # type: ignore[no-untyped-def]
    measure = known_measures()["heldout_nll"]
    along = measure_plot(found, measure, name="a")
    assert along is not None
    assert "virtual tokens" in along
    assert "base model" in along
    beside = measure_plot(result(found.arms, []), measure, name="b")
    assert beside is not None
    assert ">short<" in beside.replace("&gt;", ">")
    assert measure_plot(found, known_measures()["rollbacks"], name="c") is None
    rates = rates_plot(found, name="d")
    assert rates is not None
    assert "short" in rates
    assert rates_plot(result([arm("a", [1.0]), arm("b", [2.0])], []), name="e") is None


def test_the_index_counts_and_links(found, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folders = [tmp_path / "one", tmp_path / "two words"]
    for folder in folders:
        folder.mkdir()
        write_results(found, folder)
        write_page(folder)
    page = write_index(folders, tmp_path).read_text(encoding="utf-8")
    assert "2 studies, 12 training runs that count; 2 of them\ndiverged." in page
    assert 'href="one/study.html"' in page
    assert 'href="two words/study.html"' in page
    assert page.count("Short beats long.") == 2


def test_layers_are_drawn_for_arms_that_differ_in_them() -> None:
    measure = known_measures()["heldout_nll"]
    settings = {"every layer": None, "first two": "[0, 1]", "layer 3 alone": [3]}
    arms = [
        replace(arm(name, [4.0 + place, 4.0 + place]), settings={"prefix.layers": layers})
        for place, (name, layers) in enumerate(settings.items())
    ]
    drawn = layers_plot(result(arms, []), measure, name="layers")
    assert drawn is not None
    assert all(words in drawn for words in (*settings, "4.000", "6.000"))
    opacities = [float(each) for each in re.findall(r"opacity: ([0-9.]+)", drawn)]
    assert sorted(set(opacities)) == [0.15, 0.575]  # the best is opaque, which SVG does not say
    assert opacities.count(0.575) == 2
    assert "What each layer is worth" in render_study(result(arms, []))
    assert layers_plot(result([arm("a", [4.0]), arm("b", [4.1])], []), measure, name="layers") is None
