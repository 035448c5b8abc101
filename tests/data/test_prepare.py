"""From a recipe's data section to examples: nothing leaks, everything is counted, every end has a reason."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from prefixkit.config import DataConfig, Format, SplitConfig
from prefixkit.data import PreparedData, prepare
from prefixkit.errors import DataError

EVEN = SplitConfig(train=0.4, validation=0.2, test=0.2, judge=0.2)
WORDS = ["good", "film", "bad", "movie", "plot", "fun", "story", "end", "actor", "scene"]


def review(i: int, words: int = 8) -> str:
    return " ".join([f"{i}", *(WORDS[(i + j) % 10] for j in range(words - 1))])


ROWS = [{"text": review(i), "label": ("positive", "negative")[i % 2]} for i in range(300)]


@pytest.fixture
def run(write_jsonl: Callable[..., str], bytes_tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreparedData]:
    """Prepare records with positive kept; keywords change the settings."""

    def prepared(
        rows: list[Any], *, prefix_tokens: int = 4, context_tokens: int | None = None, **settings: Any
    ) -> PreparedData:
        defaults = {"label_column": "label", "keep_label": "positive", "prompt": "Review:", "split": EVEN}
        config = DataConfig(source=write_jsonl(rows), **(defaults | settings))
        return prepare(config, bytes_tokenizer, prefix_tokens=prefix_tokens, context_tokens=context_tokens)

    return prepared


def failure(run: Callable[..., PreparedData], rows: list[Any], **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        run(rows, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_nothing_leaks_between_the_splits(run: Callable[..., PreparedData]) -> None:
    data = run(ROWS + ROWS[:40])
    splits = [{e.text for e in examples} for examples in (data.train, data.validation, data.test, data.contrast)]
    splits.append({row.text for row in data.judge_rows})
    assert all(splits)
    assert len(set.union(*splits)) == sum(map(len, splits))


def test_labels_go_where_they_belong(run: Callable[..., PreparedData]) -> None:
    label = {row["text"]: row["label"] for row in ROWS}
    data = run(ROWS)
    assert {label[e.text] for e in (*data.train, *data.validation, *data.test)} == {"positive"}
    assert {label[e.text] for e in data.contrast} == {"negative"}
    for rows in (data.judge_rows, data.judge_test_rows):
        assert {row.label for row in rows} == {"positive", "negative"}
        assert all(label[row.text] == row.label for row in rows)
    assert {row.text for row in data.judge_test_rows} == {e.text for e in (*data.test, *data.contrast)}
    assert data.kept_label == "positive"


def test_counts_add_up(run: Callable[..., PreparedData]) -> None:
    rows = [
        *ROWS,
        {"text": ROWS[0]["text"].upper(), "label": "positive"},
        {"text": ROWS[2]["text"], "label": "negative"},
        {"text": "too short", "label": "positive"},
        {"text": review(999, 40), "label": "positive"},
    ]
    data = run(rows, min_words=3, max_words=20, max_tokens=512)
    counts = data.counts
    assert (counts.read, counts.duplicates, counts.contradictory) == (304, 1, 2)
    assert (counts.other_label, counts.too_short, counts.too_long) == (150, 1, 1)
    assert (
        counts.train,
        counts.validation,
        counts.test,
        counts.contrast,
        counts.judge,
        counts.judge_test,
    ) == tuple(
        map(
            len,
            (data.train, data.validation, data.test, data.contrast, data.judge_rows, data.judge_test_rows),
        )
    )
    judged_positive = sum(row.label == "positive" and 3 <= len(row.text.split()) <= 20 for row in data.judge_rows)
    assert counts.train + counts.validation + counts.test + judged_positive == 149
    assert (counts.truncated, counts.without_loss) == (0, 0)
    assert set(dataclasses.asdict(counts)) >= {"read", "train"}


def test_clearest_chooses_among_training_rows_alone(run: Callable[..., PreparedData]) -> None:
    whole, half = run(ROWS), run(ROWS, clearest=0.5)
    assert len(half.train) == half.counts.train == round(len(whole.train) / 2)
    assert half.counts.unclear == len(whole.train) - len(half.train)
    assert set(half.train) < set(whole.train)
    for split in ("validation", "test", "contrast", "judge_rows", "judge_test_rows"):
        assert getattr(half, split) == getattr(whole, split)
    assert half.hash != whole.hash


def test_settings_that_came_later_leave_the_hash_as_it_was(run: Callable[..., PreparedData]) -> None:
    """A run of an earlier release is resumed and measured on the data it knows."""
    assert run(ROWS).hash == "305ef4bffcf984796aeafe39a8d3f7271724c775dbdc6d84623033cf49a14ea3"
    assert run(ROWS, likeliest=0.5).hash != run(ROWS).hash


def test_the_judge_learns_from_no_target_that_is_also_learned_or_reported(run: Callable[..., PreparedData]) -> None:
    rows = [{"input": f"question {i}", "target": f"answer {i % 40}", "label": ("positive", "negative")[i % 2]}
            for i in range(400)]  # fmt: skip
    data = run(rows, format="input_target", prompt="")
    assert data.judge_test_rows
    judged = {row.text for row in data.judge_rows}
    assert judged.isdisjoint(row.text for row in data.judge_test_rows)
    assert judged.isdisjoint(example.text for example in (*data.train, *data.validation, *data.test))


def test_judge_learns_from_every_length(run: Callable[..., PreparedData]) -> None:
    rows = ROWS + [{"text": review(i, 30), "label": "positive"} for i in range(1000, 1100)]
    data = run(rows, max_words=20)
    assert any(len(row.text.split()) == 30 for row in data.judge_rows)
    assert all(len(row.text.split()) <= 20 for row in data.judge_test_rows)


def test_cleaning_comes_before_duplicates_and_can_be_left_out(run: Callable[..., PreparedData]) -> None:
    twin = {"text": ROWS[0]["text"].replace(" ", "<br />"), "label": "positive"}
    assert run([*ROWS, twin]).counts.duplicates == 1
    assert run([*ROWS, twin], clean_html=False).counts.duplicates == 0


def test_without_labels_there_is_neither_contrast_nor_judge_and_its_rows_are_learned_from(
    run: Callable[..., PreparedData],
) -> None:
    data = run(ROWS, label_column=None, keep_label=None)
    assert (data.contrast, data.judge_rows, data.judge_test_rows, data.kept_label) == ((), (), (), None)
    assert data.counts.train + data.counts.validation + data.counts.test == data.counts.read == 300


def test_label_column_alone_keeps_every_row_and_feeds_the_judge(run: Callable[..., PreparedData]) -> None:
    data = run(ROWS, keep_label=None)
    assert data.counts.other_label == 0
    assert data.contrast == ()
    assert data.judge_rows


def test_hash_follows_what_training_sees(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    first = run(ROWS).hash
    assert run(ROWS).hash == first
    assert run(ROWS[::-1]).hash != first, "training sees the rows in order"
    assert run(ROWS[:250]).hash != first
    assert run(ROWS, prompt="Film:").hash != first
    assert run(ROWS, max_tokens=12).hash != first


def test_hash_does_not_depend_on_where_the_file_lies(
    run: Callable[..., PreparedData],
    write_jsonl: Callable[..., str],
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = DataConfig(source=write_jsonl(ROWS, "elsewhere.jsonl"), label_column="label",
                        keep_label="positive", prompt="Review:", split=EVEN)  # fmt: skip
    moved = prepare(config, bytes_tokenizer, prefix_tokens=4, context_tokens=None)
    assert moved.hash == run(ROWS).hash


def test_prefix_and_text_must_fit_the_context(run: Callable[..., PreparedData]) -> None:
    data = run(ROWS, max_tokens=12)
    longest = max(len(e.input_ids) for e in (*data.train, *data.validation, *data.test, *data.contrast))
    assert run(ROWS, max_tokens=12, prefix_tokens=20, context_tokens=20 + longest).hash == data.hash
    said = failure(run, ROWS, max_tokens=12, prefix_tokens=20, context_tokens=19 + longest)
    assert said == (
        f"prefix 20 + text {longest} tokens exceed the model's context of {19 + longest}; "
        "lower data.max_tokens or prefix.num_virtual_tokens"
    )


def test_nothing_left_says_which_filter_took_what(run: Callable[..., PreparedData]) -> None:
    rows = [*ROWS, {"text": review(500, 50), "label": "positive"}]
    said = failure(run, rows, min_words=20, max_words=30)
    assert said.endswith(
        "none of 301 rows left to learn from: 150 have another label than positive (data.keep_label), "
        "150 have fewer than 20 words (data.min_words), 1 have more than 30 words (data.max_words); "
        "widen the filters"
    )
    twins = [{"text": "same", "label": "positive"}, {"text": "same", "label": "negative"}]
    assert "2 have the text of a row with another label" in failure(run, twins)


def test_an_input_that_is_always_the_same_is_said_to_be(run: Callable[..., PreparedData]) -> None:
    """More rows would not help: those of one input stay together."""
    rows = [{"input": "write a review", "target": f"film number {place} was good"} for place in range(200)]
    said = failure(run, rows, format="input_target", input_column="input", target_column="target", keep_label=None,
                   label_column=None)  # fmt: skip
    assert "no row fell into it: all 200 rows have 1 inputs between them, and rows of one input stay together" in said
    assert said.endswith("belongs into data.prompt, with data.format=text")


def test_empty_split_says_which(run: Callable[..., PreparedData]) -> None:
    said = failure(run, ROWS[:2], label_column=None, keep_label=None)
    assert said.startswith("data.split.")
    assert said.endswith("none of the 2 rows left after the filters fell into it; give more rows or a larger share")


def test_prompt_that_fills_every_example_is_an_error(run: Callable[..., PreparedData]) -> None:
    said = failure(run, ROWS, prompt="The movie was terrible. " * 20, max_tokens=16)
    assert said.startswith(
        "data.max_tokens: what stands before the learned text fills all 16 tokens in every row of the train split ("
    )
    assert said.endswith("; raise data.max_tokens or shorten data.prompt")


def test_rows_without_loss_are_counted_and_said(
    run: Callable[..., PreparedData], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"input": f"{i} " + "film " * (60 if i % 10 == 0 else 1), "target": "good"} for i in range(200)]
    settings = {"format": Format.INPUT_TARGET, "label_column": None, "keep_label": None, "prompt": ""}
    data = run(rows, max_tokens=24, **settings)
    assert data.counts.without_loss > 0
    assert all(e.loss_tokens for e in (*data.train, *data.validation, *data.test))
    assert "rows left out: within 24 tokens nothing learned remained of them (data.max_tokens)" in caplog.text


def test_fewer_rows_are_drawn_from_the_training_rows_alone(run: Callable[..., PreparedData]) -> None:
    whole, ten, twenty = run(ROWS), run(ROWS, train_rows=10), run(ROWS, train_rows=20)
    assert (len(ten.train), len(twenty.train)) == (10, 20)
    assert set(ten.train) < set(twenty.train) < set(whole.train)
    assert [example for example in whole.train if example in ten.train] == list(ten.train)  # in the source's order
    assert (ten.validation, ten.test, ten.contrast) == (whole.validation, whole.test, whole.contrast)
    assert len({whole.hash, ten.hash, twenty.hash}) == 3


def test_another_seed_draws_other_rows(run: Callable[..., PreparedData]) -> None:
    assert run(ROWS, train_rows=10).train == run(ROWS, train_rows=10).train
    assert run(ROWS, train_rows=10).train != run(ROWS, train_rows=10, subset_seed=1).train


def test_the_seed_of_a_draw_that_is_not_made_changes_nothing(run: Callable[..., PreparedData]) -> None:
    """So that runs from before there were draws still know their data."""
    assert run(ROWS).hash == run(ROWS, subset_seed=1).hash
    assert run(ROWS, train_rows=1000).train == run(ROWS).train


def test_other_labels_are_learned_too_and_tested_on_nothing(run: Callable[..., PreparedData]) -> None:
    label = {row["text"]: row["label"] for row in ROWS}
    alone, both = run(ROWS, train_rows=12), run(ROWS, train_rows=12, learn_also=["negative"])
    learned = [label[example.text] for example in both.train]
    assert (learned.count("positive"), learned.count("negative")) == (12, 12)
    assert {example for example in both.train if label[example.text] == "positive"} == set(alone.train)
    assert (both.validation, both.test, both.contrast) == (alone.validation, alone.test, alone.contrast)
    assert not {e.text for e in both.train} & {e.text for e in (*both.test, *both.validation, *both.contrast)}
    assert both.hash != alone.hash


@pytest.mark.parametrize(("also", "twice"), [(["negative", "negative "], "negative"), ([" positive"], "positive")])
def test_a_label_is_not_learned_twice(run: Callable[..., PreparedData], also: list[str], twice: str) -> None:
    """Written in two ways, as 1 and "1" are: its rows would be read twice."""
    message = failure(run, ROWS, learn_also=also)
    assert message == f'data.learn_also: "{twice}" is learned already; name each label once'


def test_a_label_to_learn_also_that_is_not_there_is_refused(run: Callable[..., PreparedData]) -> None:
    message = failure(run, ROWS, learn_also=["neutral"])
    assert message.startswith("data.learn_also: no row of ")
    assert message.endswith('has "neutral" in column "label"; labels: negative, positive')
