"""Numbers people read are those of the committed result files."""

import importlib.util
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from xml.etree import ElementTree

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from prefixkit.config import load_recipe, load_study, validate_recipe
from prefixkit.errors import PrefixkitError, TrainingError
from prefixkit.files import read_json, write_json
from prefixkit.lab.study.page import render_study
from prefixkit.lab.study.results import read_results
from prefixkit.models.inspect import inspect_model
from prefixkit.training import read_metrics

ROOT = Path(__file__).parents[1]


def load_publish(name="publish"):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_says_what_the_result_files_say():
    publish = load_publish()
    folder = publish.RESULTS / "positive-reviews"
    run, scores = read_json(folder / publish.RUN), read_json(folder / publish.SCORES)
    for language in publish.LANGUAGES:
        block = publish.readme_block(run, scores, read_json(publish.QUALITY), read_json(publish.UNSEEN), language)
        assert block in (ROOT / language.readme).read_text(encoding="utf-8")


def test_the_comparison_on_unseen_reviews_is_that_of_its_trials(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    result = read_json(load_publish().UNSEEN)
    again = load_publish("quality_unseen").summarise(result)
    assert again == result
    assert len(result["trials"]) == 6
    assert {len(trial["test_sums"]) for trial in result["trials"]} == {result["data"]["rows"]}
    assert validate_recipe(result["recipe"]) == load_recipe("positive-reviews")


def test_a_comparison_goes_on_only_as_it_was_begun(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    quality, out = load_publish("quality_vs_peft"), tmp_path / "out.json"
    setting = quality.conditions("quality_vs_peft", load_recipe("positive-reviews"))
    assert quality.made_before(setting, out) is None
    write_json(out, setting | {"trials": [1]})
    assert quality.made_before(setting, out)["trials"] == [1]
    with pytest.raises(
        TrainingError, match=r"out.json: made with other settings or versions; give another --out or del"
    ):
        quality.made_before(setting | {"threads": 99}, out)


def test_the_time_that_choosing_examples_took_is_told_where_it_is_known():
    publish = load_publish()
    folder = publish.RESULTS / "positive-reviews"
    files = (folder / publish.RUN, folder / publish.SCORES, publish.QUALITY, publish.UNSEEN)
    run, *others = map(read_json, files)
    for language, words in zip(publish.LANGUAGES, ("after 4 min 22 s of choosing", "挑選例子 4 分 22 秒"), strict=True):
        assert words in publish.readme_block(run | {"choosing_seconds": 262.0}, *others, language)


def test_every_language_of_readme_links_to_the_others_and_says_as_much():
    english, chinese = ((ROOT / each.readme).read_text(encoding="utf-8") for each in load_publish().LANGUAGES)
    assert "](README.zh-TW.md)" in english
    assert "](README.md)" in chinese
    for pattern in (r"^## ", r"^- \*\*", r"^prefixkit \w+.*$", r"^\| [^\n]+ \|$", r"^```"):
        counts = [len(re.findall(pattern, text, re.MULTILINE)) for text in (english, chinese)]
        assert counts[0] == counts[1] > 0, pattern
    links = [set(re.findall(r"\]\(([^)]+)\)", text)) - {each.readme for each in load_publish().LANGUAGES}
             for text in (english, chinese)]  # fmt: skip
    assert links[0] == links[1]


def test_published_runs_and_benchmarks_trained_the_shipped_recipe():
    """A result of another recipe than the one that ships would answer for something nobody can run."""
    publish = load_publish()
    shipped = load_recipe("positive-reviews")
    run, quality = read_json(publish.RESULTS / "positive-reviews" / publish.RUN), read_json(publish.QUALITY)
    # Settings that came later are not in the files: their defaults leave everything as it was.
    assert validate_recipe(run["recipe"]) == shipped
    asked = validate_recipe(quality["recipe"])
    assert asked.model_copy(update={"generation": shipped.generation}) == shipped  # no text was generated for it


def test_the_page_on_diagnosing_says_what_the_published_diagnosis_says():
    publish = load_publish("publish_diagnosis")
    folder = publish.RESULTS / "positive-reviews"
    found = publish.read_diagnosis(folder / publish.DIAGNOSIS)
    page = publish.PAGE.read_text(encoding="utf-8")
    assert publish.findings_block(found) in page
    assert found.prefix_hash == read_json(folder / "run.json")["content_hash"]
    for name in publish.PICTURES:
        assert f"results/positive-reviews/{name}" in page
        picture = (folder / name).read_text(encoding="utf-8")
        assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in picture


def test_the_page_on_classification_says_what_the_published_run_says():
    publish = load_publish("publish_labels")
    run, scores, predictions = publish.read_published("review-sentiment")
    assert publish.results_block(run, scores, predictions) in publish.PAGE.read_text(encoding="utf-8")
    assert validate_recipe(run["recipe"]) == load_recipe("review-sentiment")
    assert all(not line["text"] for line in predictions)


def test_the_page_on_performance_says_what_the_result_says(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    publish = load_publish("publish_speed")
    page = publish.PAGE.read_text(encoding="utf-8")
    files = (
        publish.RESULT,
        publish.RESIDENT,
        publish.CURVES,
        publish.PADDING,
        publish.QUALITY,
        publish.COMPILING,
        publish.ATTENTION,
    )
    assert page == publish.render(*map(read_json, files))
    result, resident, *_ = map(read_json, files)
    for name in ("README.md", "README.zh-TW.md"):
        table = publish.readme_table(result, resident, read_json(publish.QUALITY), name)
        assert table in (ROOT / name).read_text(encoding="utf-8")
        assert len(table.splitlines()) == 16  # every goal there is
    for figure in (publish.FIGURE, publish.CURVES_FIGURE):
        assert f"results/{figure.name}" in page
        assert ElementTree.fromstring(figure.read_text(encoding="utf-8")).tag == "{http://www.w3.org/2000/svg}svg"


def test_a_loss_is_reached_at_the_first_step_that_is_no_worse(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    race = load_publish("time_to_quality")

    def trial(method, rate, *losses):
        curve = [{"step": 10 * n, "validation_loss": loss} for n, loss in enumerate(losses)]
        return {"method": method, "learning_rate": rate, "curve": curve}

    quality = {"trials": [
        trial("prefixkit", 0.02, 5.0, 4.0, 3.0, 2.9), trial("prefixkit", 0.01, 5.0, 4.4, 3.4, 3.2),
        trial("peft-prefix", 0.1, 9.0, 5.0, 4.1, 4.2), trial("peft-prefix", 0.01, 9.0, 8.0, 7.0, 6.0),
        trial("lora", 0.001, 4.0, 3.0, 2.8, 2.95),
    ]}  # fmt: skip
    times = {"prefixkit": 1.0, "peft-prefix": 2.0, "lora": 1.5}
    rows = {name: {"time_beside_first": {"median": time}} for name, time in times.items()}
    best, plain, lora = race.races(quality, {"suites": {"training": {"contestants": rows}}})
    assert (best.loss, best.rival, best.own, best.time, best.is_met) == (4.1, 20, 10, 0.25, True)
    assert (plain.loss, plain.rival, plain.own, plain.time, plain.is_met) == (6.0, 30, 0, 0.0, True)
    assert (lora.loss, lora.rival, lora.own, lora.time, lora.is_met) == (2.8, 20, None, None, True)
    rows["prefixkit"]["time_beside_first"]["median"] = 3.0  # slower than the rival, step for step
    slow, *_ = race.races(quality, {"suites": {"training": {"contestants": rows}}})
    assert (slow.time, slow.is_met) == (0.75, False)
    quality["trials"][2:4] = [trial("peft-prefix", 0.01, 1.0, 2.0)]  # never reached
    assert not any(each.is_met for each in race.races(quality, {"suites": {"training": {"contestants": rows}}})[:2])


def test_the_page_on_many_processes_says_how_near_the_estimate_came():
    found = read_json(ROOT / "benchmarks" / "results" / "estimate.json")
    page = " ".join((ROOT / "docs" / "many-processes.md").read_text(encoding="utf-8").split())
    estimated, took = found["estimate"], found["run"]
    time, memory = estimated["seconds"] / took["seconds_per_step"], estimated["peak"] / took["peak_bytes"]
    assert f"{took['steps']} steps took {took['seconds_per_step']:.2f} s each at their mean" in page
    assert f"the estimate said {estimated['seconds']:.2f} s, {time:.2f} times that" in page
    assert (
        f"It said {estimated['peak'] / 1e9:.2f} GB of memory where {took['peak_bytes'] / 1e9:.2f} GB were taken" in page
    )
    assert f"taken, {memory:.2f} times that" in page
    lines = read_metrics(ROOT / "docs" / "results" / "positive-reviews" / "metrics.jsonl")
    assert load_publish("estimate_vs_run").seconds_per_step(lines) == took["seconds_per_step"]  # the same run
    tokens = mean(
        line["tokens"] - before["tokens"]
        for before, line in pairwise(lines)
        if "heldout_loss" not in before and "heldout_loss" not in line
    )
    assert f"of {estimated['tokens']:.0f} tokens a step, and the run learns from the likeliest, of {tokens:.0f}" in page
    assert f"per token it said {time * tokens / estimated['tokens']:.2f} times what was taken" in page
    assert validate_recipe(found["recipe"]) == load_recipe("positive-reviews")


def test_an_estimate_is_held_against_the_steps_that_have_no_held_out_loss_beside_them():
    seconds = [0.0, 9.0, 11.0, 13.0, 20.0, 29.0, 31.0]
    metrics = [{"step": step, "seconds": value} for step, value in enumerate(seconds)]
    metrics[0]["heldout_loss"] = metrics[4]["heldout_loss"] = 3.5
    assert load_publish("estimate_vs_run").seconds_per_step(metrics) == 2.0


def test_an_estimate_is_not_held_against_a_run_of_another_machine(tmp_path, monkeypatch):
    benchmark = load_publish("estimate_vs_run")
    monkeypatch.setattr(benchmark, "estimate_run", lambda recipe: (None, None))
    write_json(tmp_path / "run.json", {"recipe": {}, "machine": {"cpu": "another"}, "threads": 1})
    with pytest.raises(TrainingError, match="was trained on another with 1 threads, this is .*; train it here"):
        benchmark.compare(tmp_path)


def test_the_page_on_studies_says_what_the_published_results_say():
    publish = load_publish("publish_study")
    results = publish.published()
    assert publish.results_block(results) in publish.PAGE.read_text(encoding="utf-8")
    assert results[0].study.title in render_study(results[0])  # its page can be made from what is published
    for result in results:
        folder = publish.RESULTS / result.study.name
        assert (folder / publish.STUDY_PAGE).read_text(encoding="utf-8") == publish.study_page(result)
        assert (folder / publish.PICTURE).is_file()
        assert (result.mixed_versions, result.mixed_data, result.mixed_hardware) == ({}, [], [])
        assert read_results(folder) == result  # held against the claims as they are written today


def test_a_study_whose_file_runs_something_else_by_now_is_not_published():
    publish = load_publish("publish_study")
    result = publish.published()[0]
    reworded = replace(result, study=result.study.model_copy(update={"title": "Old words", "claims": []}))
    assert publish.as_shipped(reworded) == result
    other = replace(result, study=result.study.model_copy(update={"rates": [7.0]}))
    with pytest.raises(PrefixkitError, match=f"^{result.study.name}: its study file runs something else by now"):
        publish.as_shipped(other)


def test_what_studies_count_on_the_lab_pages_model() -> None:
    """GPT-2 has these many numbers; claims about shares of them are settled by counting."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    of_a_token = sum(2 * site.kv_heads * site.head_dim for site in inspect_model(model).geometry.sites)
    biases = sum(each.numel() for name, each in model.named_parameters() if name.endswith("bias"))
    words = " ".join(claim.why for name in ("methods", "length") for claim in load_study(name).claims)
    for count in (20 * of_a_token, biases, 20 * model.config.n_embd):
        assert f"{count:,}" in words
    total = model.num_parameters()
    for share in (20 * of_a_token / total, biases / total, 20 * model.config.n_embd / total):
        assert f"{100 * share:.2f}%" in words or f"{100 * share:.3f}%" in words
    assert (math.ceil(0.001 * total / of_a_token), math.floor(0.01 * total / of_a_token)) == (7, 67)
