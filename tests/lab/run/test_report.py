"""The report: what it shows, what it leaves out, and that it loads nothing."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from prefixkit.config import Recipe
from prefixkit.errors import EvaluationError
from prefixkit.lab.pages.comparison import Better, best_system, compare
from prefixkit.lab.pages.facts import format_bytes, format_duration, recipe_changes
from prefixkit.lab.pages.plots import loss_plot
from prefixkit.lab.run.report import SHOWN_SAMPLES, sample_rows, split_copied, write_report

SCORES: dict[str, Any] = {
    "heldout_nll": 3.62, "instruction.heldout_nll": 3.94, "base.heldout_nll": 4.05,
    "heldout_ppl": 37.3, "instruction.heldout_ppl": 51.4, "base.heldout_ppl": 57.4,
    "heldout_nll_negative": 3.91, "instruction.heldout_nll_negative": 4.06, "base.heldout_nll_negative": 4.07,
    "steering_gap": 0.29, "instruction.steering_gap": 0.12, "base.steering_gap": 0.02,
    "sentiment_accuracy": 0.934, "instruction.sentiment_accuracy": 0.891, "base.sentiment_accuracy": 0.391,
    "judge_accuracy": 0.882, "judge_accuracy_short": 0.804,
    "fluency_ppl": 21.2, "instruction.fluency_ppl": 18.4, "base.fluency_ppl": 20.9,
    "repetition": 0.031, "instruction.repetition": 0.045, "base.repetition": 0.052,
    "distinct_1": 0.21, "instruction.distinct_1": 0.19, "base.distinct_1": 0.22,
    "distinct_2": 0.71, "instruction.distinct_2": 0.66, "base.distinct_2": 0.70,
    "self_bleu": 12.4, "instruction.self_bleu": 15.1, "base.self_bleu": 11.9,
    "novelty": 0.93, "instruction.novelty": 0.95, "base.novelty": 0.96,
    "longest_copy": 9, "instruction.longest_copy": 8, "base.longest_copy": 8,
    "trainable_parameters": 230400, "instruction.trainable_parameters": 0, "base.trainable_parameters": 0,
    "intervals": {
        "heldout_nll": [3.55, 3.69], "instruction.heldout_nll": [3.86, 4.02], "base.heldout_nll": [3.97, 4.13],
        "sentiment_accuracy": [0.902, 0.961], "instruction.sentiment_accuracy": [0.852, 0.926],
        "base.sentiment_accuracy": [0.332, 0.449],
        "fluency_ppl": [19.8, 22.6], "instruction.fluency_ppl": [17.2, 19.6], "base.fluency_ppl": [19.1, 22.8],
        "steering_gap": [0.21, 0.37], "instruction.steering_gap": [0.03, 0.2], "base.steering_gap": [-0.06, 0.1],
    },
}  # fmt: skip

TEXTS = {
    "prefix": "This is one of the best films I have ever seen. The acting is superb, the story moves at a "
    "gentle pace, and the ending left me smiling for days. A small wonder that deserves a large audience.",
    "instruction": "I loved this movie! The characters were great and the plot was great and I would "
    "recommend it to everyone who likes great movies.",
    "base": "<script>alert(1)</script> The movie is about a man who goes to a house. I did not know what to "
    "make of it, and neither, I think, did the director.",
}


def fake_run() -> dict[str, Any]:
    recipe = Recipe.model_validate(
        {
            "name": "positive-reviews",
            "licence": "Base model Apache-2.0. Data: research use.",
            "prefix": {"init": {"text": "Write a positive review of a movie you loved."}},
            "data": {"label_column": "label", "keep_label": "positive", "prompt": "Review:", "min_words": 20},
            "evaluation": {"instruction": "Write a positive review of a movie you loved."},
        }
    )
    return {
        "name": "positive-reviews",
        "description": "Continues “Review:” as an enthusiastic movie review.",
        "recipe": recipe.model_dump(mode="json"),
        "base": {"id": "smollm2-135m", "fingerprint": "sha256:" + "ab12" * 16, "licence": "apache-2.0"},
        "seed": 0, "steps": 200, "best_step": 150, "best_heldout_loss": 3.58, "tokens": 143210,
        "seconds": 372.4, "tokens_per_second": 384.6, "peak_memory_bytes": 2_140_000_000,
        "trainable_parameters": 230400, "materialised_bytes": 921600, "num_virtual_tokens": 20,
        "data_hash": "d1" * 32, "content_hash": "c2" * 32, "rollbacks": 0,
        "data_counts": {"read": 25000, "duplicates": 96, "splits": {"train": 2100, "test": 480}},
        "base_weights_hash": {"before": "f3" * 32, "after": "f3" * 32},
        "machine": {"cpu": "Some CPU", "cores": 2, "memory_bytes": 8_000_000_000, "accelerator": None,
                    "versions": {"torch": "2.8.0"}},
        "versions": {"prefixkit": "0.1.0", "torch": "2.8.0"},
    }  # fmt: skip


def fake_metrics() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"step": 0, "heldout_loss": 3.85, "tokens": 0, "seconds": 0.0}]
    for step in range(1, 201):
        noise = ((step * 7919) % 101) / 101 - 0.5
        line = {"step": step, "loss": 3.6 + 0.5 * 0.97**step + 0.5 * noise, "grad_norm": 0.3 + 0.1 * noise,
                "learning_rate": 5e-3 * min(step / 10, (200 - step) / 190), "tokens": 700 * step,
                "seconds": 1.8 * step}  # fmt: skip
        if step % 50 == 0:
            line["heldout_loss"] = {50: 3.66, 100: 3.61, 150: 3.58, 200: 3.585}[step]
        lines.append(line)
    return lines


def fake_samples(count: int = 14) -> list[dict[str, Any]]:
    verdicts = {"prefix": (True, 0.97), "instruction": (True, 0.81), "base": (False, 0.34)}
    return [
        {"system": system, "index": index, "prompt": "Review:", "text": text, "is_wanted": verdicts[system][0],
         "probability": verdicts[system][1], "longest_copy": None,
         "copied": [{"start": 0, "end": 31, "words": 8}] if system == "prefix" else []}
        for index in range(count)
        for system, text in TEXTS.items()
    ]  # fmt: skip


def write_files(folder: Path, *names: str) -> Path:
    """Write the named files of a fake run, all of them if none is named."""
    lines = {"metrics.jsonl": fake_metrics(), "samples.jsonl": fake_samples()}
    whole = {"run.json": fake_run(), "scores.json": SCORES}
    for name in names or (*lines, *whole):
        text = json.dumps(whole[name]) if name in whole else "".join(json.dumps(o) + "\n" for o in lines[name])
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def page_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


@pytest.fixture
def page(tmp_path: Path) -> str:
    return page_of(write_files(tmp_path))


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="(\w+)">', page)


def test_report_lands_in_the_run_folder_and_leaves_nothing_else(tmp_path):
    folder = write_files(tmp_path / "", "run.json")
    assert write_report(folder) == folder / "report.html"
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "run.json"]


def test_texts_of_people_have_a_column_and_are_never_the_best(tmp_path):
    people = {"real.fluency_ppl": 12.0, "real.distinct_2": 0.9}
    intervals = SCORES["intervals"] | {"real.fluency_ppl": [11.0, 13.0]}
    rows = {row.measure.key: row for row in compare(SCORES | people | {"intervals": intervals})}
    assert rows["fluency_ppl"].cells["real"].text == "12.0"
    assert not any(cell.is_best for cell in rows["fluency_ppl"].cells.values())
    (tmp_path / "scores.json").write_text(json.dumps(SCORES | people))
    assert ">people</th>" in page_of(tmp_path)
    assert ">people</th>" not in page_of(write_files(tmp_path))


def test_page_has_every_section(page):
    assert sections(page) == ["curves", "comparison", "samples", "made"]


def test_headline_numbers_stand_beside_what_they_were(page):
    numbers = re.findall(r'<section class="number">.*?</section>', page, flags=re.DOTALL)
    plain = [" ".join(re.sub(r"<[^>]+>", " ", number).split()) for number in numbers]
    assert plain[0].startswith("Held-out loss 3.620 instruction 3.940 base model 4.050")
    assert plain[1].startswith("Judged as wanted 93.4% instruction 89.1% base model 39.1%")
    assert plain[2].startswith("Numbers trained 230,400 as a file 922 kB virtual tokens 20")


def test_page_loads_nothing_and_runs_nothing(page):
    assert "http" not in page
    assert "<script" not in page
    assert not re.search(r"<(link|img|iframe|object|embed)\b|@import|\bsrc=", page)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_markup_in_samples_prompts_and_names_is_escaped(tmp_path):
    run = fake_run() | {"name": "<b>bold</b>", "description": "<img src=x onerror=y>"}
    run["recipe"]["data"]["keep_label"] = "<i>"
    sample = {"system": "prefix", "index": 0, "prompt": "</p><script>p()</script>", "text": "<mark>no</mark> & so",
              "is_wanted": True, "probability": None, "copied": [{"start": 0, "end": 3, "words": 1}]}  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    page = page_of(tmp_path)
    for raw in ("<script", "<b>bold", "<img", "<i>", "<mark>no"):
        assert raw not in page.replace("<mark>Marked", "").replace('<i class="', "")
    assert "<mark>&lt;ma</mark>rk&gt;no&lt;/mark&gt; &amp; so" in page


def test_copied_spans_are_marked_and_the_rest_is_not(page):
    assert "<mark>This is one of the best films I</mark> have ever seen." in page
    assert page.count("<mark>") == SHOWN_SAMPLES + 1  # one in the legend


def test_first_samples_are_shown_unpicked_and_counted(page):
    assert "The first 12 of 14 prompts; nobody picked them." in page
    assert re.findall(r'<p class="prompt">(\d+) ·', page) == [str(n) for n in range(1, 13)]


def test_what_people_answered_stands_above_what_the_systems_did(tmp_path):
    lines = [line | {"references": ["One <b>.", "Two.", "Three.", "Four."]} for line in fake_samples(1)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = " ".join(page_of(tmp_path).split())
    assert '<p class="prompt">people wrote “One &lt;b&gt;.”, “Two.”, “Three.” and 1 more</p>' in page
    assert "people wrote" not in page_of(write_files(tmp_path))


def test_answers_are_compared_by_each_metric_of_the_field(tmp_path):
    scores = {
        "bleu": 58.69, "base.bleu": 12.3, "chrf": 72.5, "nist": 8.113, "rouge_1": 0.815, "rouge_2": 0.59,
        "rouge_l": 0.653, "meteor": 0.775, "intervals": {"bleu": [55.8, 61.4], "base.bleu": [10.0, 15.0]},
    }  # fmt: skip
    rows = {row.measure.label: row.cells["prefix"] for row in compare(scores)}
    assert {label: cell.text for label, cell in rows.items()} == {
        "BLEU": "58.7", "chrF": "72.5", "NIST": "8.11", "ROUGE-1": "81.5%", "ROUGE-2": "59.0%", "ROUGE-L": "65.3%",
        "METEOR": "77.5%",
    }  # fmt: skip
    assert rows["BLEU"].is_best
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    numbers = re.findall(r'<section class="number">.*?</section>', page_of(tmp_path), flags=re.DOTALL)
    plain = " ".join(re.sub(r"<[^>]+>", " ", numbers[0]).split())
    assert plain == "BLEU 58.7 base model 12.3 beside people; 100 is the same"


def test_wanted_verdicts_are_told_from_others(page):
    assert '<span class="badge wanted">positive 97%</span>' in page
    assert '<span class="badge">not positive 66%</span>' in page


def test_judge_accuracy_stands_beside_its_verdicts(page):
    assert "right on 88.2% of real texts" in page
    assert "80.4% when they are cut" in page


def test_recipe_lists_only_what_differs_with_its_default(page):
    changes = {fact.name: (fact.value, fact.note) for fact in recipe_changes(fake_run()["recipe"])}
    assert changes["data.min_words"] == ("20", "1")
    assert changes["data.keep_label"] == ("positive", "none")
    assert "train.learning_rate" not in changes
    assert "data.min_words" in page


def test_equal_weight_hashes_are_said_to_be_equal(page):
    assert "The base model is unchanged." in page
    assert "f3" * 32 in page


def test_changed_weights_are_an_alarm(tmp_path):
    run = fake_run() | {"base_weights_hash": {"before": "aa", "after": "bb"}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    page = page_of(tmp_path)
    assert "The base model's weights changed." in page
    assert "is unchanged" not in page


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("run.json", ["made"]),
        ("metrics.jsonl", ["curves"]),
        ("scores.json", ["comparison"]),
        ("samples.jsonl", ["samples"]),
    ],
)
def test_only_sections_with_a_file_behind_them_are_shown(tmp_path, name, shown):
    assert sections(page_of(write_files(tmp_path, name))) == shown


def test_unfinished_run_without_measured_weights_claims_nothing(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"name": "x", "base_weights_hash": {"before": "aa"}}))
    page = page_of(tmp_path)
    assert "unchanged" not in page
    assert sections(page) == []


def test_system_that_was_not_measured_has_no_column(tmp_path):
    scores = {key: value for key, value in SCORES.items() if not key.startswith("instruction.")}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    page = page_of(tmp_path)
    assert '<td class="instruction' not in page
    assert "--columns: 2" in page


def test_same_files_give_the_same_bytes(tmp_path):
    folder = write_files(tmp_path)
    assert page_of(folder) == page_of(folder)


def test_ids_in_the_page_are_unique(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) > 20
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page))
    for reference in re.findall(r'(?:href="#|url\(#)([^")]+)', page):
        assert reference in ids


def test_curve_marks_the_best_step():
    assert "best 3.580" in loss_plot(fake_metrics(), name="a", best_step=150)
    assert "best 3" not in loss_plot(fake_metrics(), name="a", best_step=151)


def test_curve_colours_follow_the_theme():
    svg = loss_plot(fake_metrics(), name="a", best_step=150)
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) == set()
    assert "var(--prefix)" in svg


def test_no_curve_without_a_loss(tmp_path):
    assert loss_plot([{"step": 1, "grad_norm": 1.0}, {"step": 2, "loss": float("nan")}], name="a") is None


def test_after_a_rollback_the_last_line_of_a_step_holds(tmp_path):
    lines = [{"step": 1, "loss": 900.0}, {"step": 2, "loss": 3.0}, {"step": 1, "loss": 3.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "900" not in page_of(tmp_path)


LOW, MIDDLE, HIGH = (1.0, 2.0), (1.9, 3.0), (3.1, 4.0)


@pytest.mark.parametrize(
    ("intervals", "better", "best"),
    [
        ({"prefix": HIGH, "base": LOW}, Better.HIGHER, "prefix"),
        ({"prefix": HIGH, "base": LOW}, Better.LOWER, "base"),
        ({"prefix": HIGH, "base": LOW}, Better.NEITHER, None),
        ({"prefix": LOW, "base": MIDDLE, "instruction": HIGH}, Better.LOWER, None),
        ({"prefix": LOW, "base": MIDDLE, "instruction": HIGH}, Better.HIGHER, "instruction"),
        ({"prefix": HIGH}, Better.HIGHER, None),
        ({"prefix": HIGH, "base": None}, Better.HIGHER, None),
    ],
)
def test_best_needs_intervals_that_do_not_overlap(intervals, better, best):
    values = {system: sum(interval or (0, 0)) / 2 for system, interval in intervals.items()}
    assert best_system(values, intervals, better) is best or best_system(values, intervals, better) == best


def test_table_emphasises_clear_winners_only():
    best = {row.measure.key: [c.system for c in row.cells.values() if c.is_best] for row in compare(SCORES)}
    assert best["heldout_nll"] == ["prefix"]
    assert best["sentiment_accuracy"] == []  # the instruction's interval overlaps
    assert best["steering_gap"] == ["prefix"]
    assert best["fluency_ppl"] == []
    assert best["distinct_1"] == []  # no interval, no verdict


def test_texts_of_one_prompt_and_index_share_a_row():
    rows = sample_rows(fake_samples(2), wanted="positive")
    assert [row.index for row in rows] == [0, 1]
    assert set(rows[0].texts) == {"prefix", "instruction", "base"}


def test_texts_nobody_judged_carry_no_verdict():
    samples = [line | {"is_wanted": None, "probability": None} for line in fake_samples(1)]
    assert {sample.verdict for sample in sample_rows(samples)[0].texts.values()} == {""}


@pytest.mark.parametrize(
    ("spans", "pieces"),
    [
        ([], ["-abcdef"]),
        ([[1, 3]], ["-a", "+bc", "-def"]),
        ([[1, 3], [2, 4], [4, 5]], ["-a", "+bcde", "-f"]),
        ([[4, 99], [-5, 1]], ["+a", "-bcd", "+ef"]),
        ([[3, 3]], ["-abcdef"]),
    ],
)
def test_overlapping_and_overlong_spans_lose_no_text(spans, pieces):
    assert ["-+"[p.is_copied] + p.text for p in split_copied("abcdef", spans)] == pieces


def test_empty_text_has_no_passages():
    assert split_copied("", [[0, 4]]) == []


def test_folder_without_any_file_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match=r"nothing to report; expected a run folder with run.json, metrics"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damaged_line_is_named(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"system": "base"}\n{"sys')
    with pytest.raises(EvaluationError, match=r"samples.jsonl, line 2: not valid JSON; make it again with"):
        write_report(tmp_path)


def test_file_that_is_no_object_is_named(tmp_path):
    (tmp_path / "scores.json").write_text("[1]")
    with pytest.raises(EvaluationError, match=r"scores.json: expected a JSON object, got list"):
        write_report(tmp_path)


def test_sizes_and_times_read_like_speech():
    assert [format_bytes(n) for n in (12, 921600, 2.14e9)] == ["12 B", "922 kB", "2.14 GB"]
    assert [format_duration(s) for s in (41.6, 372.4, 7500)] == ["42 s", "6 min 12 s", "2 h 05 min"]


def test_a_measure_between_trained_arms_is_no_row_of_a_report() -> None:
    scores = {f"{system}{key}": 3.0 for system in ("", "base.") for key in ("heldout_nll_late", "late_gap")}
    assert [row.measure.key for row in compare(scores)] == ["heldout_nll_late"]


def test_a_text_the_judge_knows_no_word_of_is_not_said_to_be_the_opposite_for_certain():
    line = {"system": "prefix", "index": 0, "prompt": "", "text": "", "is_wanted": False, "probability": 0.0}
    (row,) = sample_rows([line], wanted="positive")
    assert row.texts["prefix"].verdict == "says nothing the judge knows"
