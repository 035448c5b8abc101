"""The whole evaluation on a tiny model: every key, its meaning, and what is absent when it cannot be measured."""

import dataclasses
import json
import logging
import math

import numpy as np
import pytest
import torch

from prefixkit.config import Format, GenerationConfig, validate_recipe
from prefixkit.data import Example, LabelledText
from prefixkit.errors import DataError, EvaluationError
from prefixkit.evaluation import (
    SentimentJudge,
    TrainingTexts,
    check_context,
    evaluate,
    fluency_losses,
    heldout_loss,
    writing,
)
from prefixkit.evaluation.bertscore import BertScorer
from prefixkit.evaluation.overlap import bleu_sums, chrf_sums, meteor_scores, rouge_scores, word_nist_sums
from prefixkit.evaluation.picking import pick
from prefixkit.generation import generate_texts, latency
from prefixkit.seeding import derive

TEXT_KEYS = {
    "sentiment_accuracy", "fluency_ppl", "repetition", "distinct_1", "distinct_2", "distinct_3", "self_bleu", "novelty",
    "longest_copy",
}  # fmt: skip
SYSTEM_KEYS = TEXT_KEYS | {
    "heldout_nll", "heldout_ppl", "heldout_nll_late", "late_gap", "heldout_nll_negative", "steering_gap",
    "trainable_parameters",
}  # fmt: skip
REAL_KEYS = {f"real.{key}" for key in TEXT_KEYS}
STEERING_KEYS = {"steering", "instruction.steering"}
JUDGE_KEYS = {"judge_accuracy", "judge_accuracy_short"}
WITHOUT_INTERVAL = {"longest_copy", "trainable_parameters"}


def make_recipe(**evaluation):
    settings = {"heldout_rows": 8, "contrast_rows": 6, "samples": 6, "bootstrap": 100, "novelty_n": 2,
                "instruction": "write a positive review ."}  # fmt: skip
    return validate_recipe(
        {
            "data": {"label_column": "label", "keep_label": "positive", "prompt": "review :"},
            "evaluation": settings | evaluation,
            "generation": {"max_new_tokens": 12, "batch_size": 4},
        }
    )


@pytest.fixture(scope="module")
def made():
    """The evaluation once it is made: model, prefix and data are the same for every test."""
    return []


@pytest.fixture
def evaluation(base, prefix, data, made):
    if not made:
        made.append(evaluate(base, prefix, data, make_recipe()))
    return made[0]


def test_every_measure_is_there_for_every_system(evaluation):
    expected = {system + key for system in ("", "base.", "instruction.") for key in SYSTEM_KEYS}
    assert set(evaluation.scores) == expected | JUDGE_KEYS | STEERING_KEYS | REAL_KEYS


def test_intervals_hold_their_values(evaluation):
    for key, score in evaluation.scores.items():
        if key.rpartition(".")[2] in WITHOUT_INTERVAL:
            assert score.interval is None
        else:
            assert score.interval.low - 1e-9 <= score.value <= score.interval.high + 1e-9, key


def test_time_per_token_is_measured_where_it_is_asked_for(base, prefix, data, monkeypatch):
    passes = []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: 0.5 * len(passes))
    timed = base.model.register_forward_pre_hook(lambda *_: passes.append(1))
    scores = evaluate(base, prefix, data, make_recipe(latency_tokens=3, samples=0)).scores
    timed.remove()
    for key in ("seconds_per_token", "base.seconds_per_token", "instruction.seconds_per_token"):
        assert scores[key].value == 0.5
        assert scores[key].interval is None


def test_the_flat_form_is_json_with_a_pair_per_interval(evaluation):
    flat = json.loads(json.dumps(evaluation.to_flat(), allow_nan=False))
    assert set(flat) == set(evaluation.scores) | {"intervals"}
    assert flat["heldout_nll"] == evaluation.scores["heldout_nll"].value
    interval = evaluation.scores["heldout_nll"].interval
    assert flat["intervals"]["heldout_nll"] == [interval.low, interval.high]
    assert "longest_copy" not in flat["intervals"]


def test_held_out_scores_are_those_of_the_picked_rows(base, prefix, data, evaluation):
    scores = {key: score.value for key, score in evaluation.scores.items()}
    wanted, contrast = pick(data.test, 8), pick(data.contrast, 6)
    for key, attached in (("", prefix), ("base.", None)):
        losses = heldout_loss(base, wanted, prefix=attached)
        nll = losses.mean
        other = heldout_loss(base, contrast, prefix=attached).mean
        assert scores[f"{key}heldout_nll"] == nll
        assert scores[f"{key}heldout_ppl"] == math.exp(nll)
        assert scores[f"{key}heldout_nll_late"] == losses.late.mean
        assert scores[f"{key}late_gap"] == pytest.approx(losses.late.mean - losses.early.mean)
        assert scores[f"{key}heldout_nll_negative"] == other
        assert scores[f"{key}steering_gap"] == other - nll
    assert len({scores[f"{key}heldout_nll"] for key in ("", "base.", "instruction.")}) == 3
    gap, plain = scores["steering_gap"], scores["base.steering_gap"]
    assert scores["steering"] == pytest.approx(gap - plain)
    assert scores["trainable_parameters"] == 320
    assert scores["base.trainable_parameters"] == scores["instruction.trainable_parameters"] == 0


def test_scores_of_texts_are_those_of_the_samples(base, data, evaluation):
    judge = SentimentJudge.train(data.judge_rows, derive(0, "judge"), window_words=9)
    training = TrainingTexts([example.text for example in data.train])
    for system in ("prefix", "base", "instruction"):
        key = "" if system == "prefix" else f"{system}."
        own = [sample for sample in evaluation.samples if sample.system == system]
        texts, prompts = [sample.text for sample in own], [sample.prompt for sample in own]
        assert [sample.index for sample in own] == list(range(6))
        assert prompts == ["review :"] * 6
        verdicts = judge.share(texts, "positive")
        assert [sample.is_wanted for sample in own] == verdicts
        assert [sample.probability for sample in own] == judge.probabilities(texts, "positive")
        assert evaluation.scores[f"{key}sentiment_accuracy"].value == sum(verdicts) / 6
        fluency = fluency_losses(base, prompts, texts).perplexity
        assert evaluation.scores[f"{key}fluency_ppl"].value == pytest.approx(fluency)
        copies = [training.compare(text, 2) for text in texts]
        assert [(sample.longest_copy, sample.copied) for sample in own] == [(c.longest, c.spans) for c in copies]
        assert evaluation.scores[f"{key}novelty"].value == pytest.approx(
            sum(copy.novel for copy in copies) / sum(copy.ngrams for copy in copies)
        )
        assert evaluation.scores[f"{key}longest_copy"].value == max(
            copy.longest.words for copy in copies if copy.longest
        )
    assert evaluation.scores["judge_accuracy"].value == judge.accuracy(data.judge_test_rows)
    assert evaluation.scores["judge_accuracy_short"].value == judge.accuracy(data.judge_test_rows, cut=True)


def test_texts_of_people_are_measured_like_generated_ones(base, data, evaluation):
    """They are the test rows' own beginnings, as many tokens as a system may write (12 of 12 words here)."""
    judge = SentimentJudge.train(data.judge_rows, derive(0, "judge"), window_words=9)
    training = TrainingTexts([example.text for example in data.train])
    texts = [example.text for example in pick(data.test, 6)]
    scores = {key: score.value for key, score in evaluation.scores.items()}
    assert scores["real.sentiment_accuracy"] == sum(judge.share(texts, "positive")) / 6
    assert scores["real.fluency_ppl"] == pytest.approx(fluency_losses(base, ["review :"] * 6, texts).perplexity)
    copies = [training.compare(text, 2) for text in texts]
    assert scores["real.novelty"] == pytest.approx(sum(c.novel for c in copies) / sum(c.ngrams for c in copies))


@pytest.fixture
def scored(monkeypatch):
    """The texts that fluency is measured on, one entry per measurement."""
    texts_of_calls = []
    real = writing.fluency_losses

    def noted(base, prompts, texts, **told):
        texts_of_calls.append(texts)
        return real(base, prompts, texts, **told)

    monkeypatch.setattr(writing, "fluency_losses", noted)
    return texts_of_calls


def test_texts_of_people_are_cut_to_the_length_of_generations(base, prefix, data, scored):
    short = make_recipe(instruction=None).model_copy(update={"generation": GenerationConfig(max_new_tokens=3)})
    evaluate(base, prefix, data, short)
    assert scored[-1] == [" ".join(example.text.split()[:3]) for example in pick(data.test, 6)]


def test_of_a_conversation_only_the_last_reply_is_a_persons_text(base, prefix, data, scored):
    ids = tuple(base.tokenizer("the film was a story")["input_ids"])
    labels = (-100, ids[1], -100, ids[3], ids[4])
    talk = Example("the film was", "film\nstory", ids, labels, last_reply="a story")
    evaluate(base, prefix, dataclasses.replace(data, test=(talk,)), make_recipe(instruction=None, samples=1))
    assert scored[-1] == ["a story"]


def test_of_a_conversation_cut_before_its_last_reply_that_is_a_persons_text_all_the_same(base, prefix, data, scored):
    """The prompt leads up to it, whatever was learned of what fits."""
    ids = tuple(base.tokenizer("the film was a story")["input_ids"])
    talk = Example("the film was", "film\ngreat fun", ids, (-100, ids[1], -100, -100, -100), last_reply="great fun")
    evaluate(base, prefix, dataclasses.replace(data, test=(talk,)), make_recipe(instruction=None, samples=1))
    assert scored[-1] == ["great fun"]


def test_prompts_are_asked_behind_the_separator_that_training_had(base, prefix, questions):
    recipe = asking(prompts=["the film"], samples=1, latency_tokens=1)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"separator": " :"})})
    found = evaluate(base, prefix, questions, recipe)
    assert {sample.prompt for sample in found.samples} == {"the film :"}


def test_rows_of_one_input_count_together_where_the_interval_is_made(base, prefix, questions):
    """Answers to one input are no independent rows; the value is that of all their tokens."""
    found = evaluate(base, prefix, questions, asking(samples=0, heldout_rows=99)).scores
    assert (
        len(found["heldout_nll"].influence) == len({example.prompt for example in questions.test}) < len(questions.test)
    )
    assert found["heldout_nll"].value == pytest.approx(heldout_loss(base, questions.test, prefix=prefix).mean)


def test_a_contrasting_text_that_does_not_fit_is_said_before_anything_is_trained(base, data):
    ids = tuple(base.tokenizer("film " * (base.context_tokens - 3))["input_ids"])
    long = dataclasses.replace(data, contrast=(Example("", "", ids, (-100, *ids[1:])),))
    with pytest.raises(EvaluationError, match=r"text \d+ tokens exceed the model's context"):
        check_context(base, long, make_recipe(samples=0, baselines=False), prefix_tokens=5)


def test_fewer_texts_of_people_have_no_measures_of_the_set(base, prefix, data):
    few = evaluate(base, prefix, dataclasses.replace(data, test=data.test[:4]), make_recipe(samples=6)).scores
    assert {"real.fluency_ppl", "real.novelty"} <= set(few)
    assert not {"real.distinct_1", "real.distinct_2", "real.distinct_3", "real.self_bleu"} & set(few)


def test_what_does_not_fit_the_context_is_said_before_anything_is_trained(base, data):
    check_context(base, data, make_recipe(), prefix_tokens=5)
    limit = base.context_tokens
    long = make_recipe().model_copy(update={"generation": GenerationConfig(max_new_tokens=limit - 4)})
    with pytest.raises(DataError, match=rf"prefix 5 \+ prompt 2 \+ {limit - 4} new tokens exceed the model's context"):
        check_context(base, data, long, prefix_tokens=5)
    wordy = make_recipe(instruction="film " * limit)
    with pytest.raises(EvaluationError, match=r"text \d+ tokens exceed the model's context"):
        check_context(base, data, wordy, prefix_tokens=5)
    timed = make_recipe(samples=0, latency_tokens=2000)
    with pytest.raises(DataError, match="2001 new tokens exceed .* or lower evaluation.latency_tokens"):
        check_context(base, data, timed, prefix_tokens=5)


def test_every_system_writes_on_the_same_dice(base, prefix, evaluation):
    asked = {"prefix": "review :", "base": "review :", "instruction": "write a positive review .\nreview :"}
    for system, prompt in asked.items():
        texts = generate_texts(
            base,
            [prompt] * 6,
            make_recipe().generation,
            seed=derive(0, "evaluation.samples"),
            prefix=prefix if system == "prefix" else None,
        )
        assert [sample.text for sample in evaluation.samples if sample.system == system] == texts


def test_the_same_arguments_give_the_same_evaluation(base, prefix, data, evaluation):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = evaluate(base, prefix, data, make_recipe())
    assert again == evaluation
    assert torch.equal(torch.get_rng_state(), state)
    other = evaluate(base, prefix, data, make_recipe(seed=1))
    assert [s.text for s in other.samples] != [s.text for s in again.samples]
    assert other.scores["heldout_nll"].value == again.scores["heldout_nll"].value


def test_samples_become_json(evaluation):
    line = json.loads(json.dumps(dataclasses.asdict(evaluation.samples[0])))
    assert set(line) == {
        "system", "index", "prompt", "text", "is_wanted", "probability", "longest_copy", "copied", "references"
    }  # fmt: skip


def test_without_baselines_the_prefix_alone_is_measured_and_comes_out_the_same(base, prefix, data, evaluation):
    alone = evaluate(base, prefix, data, make_recipe(baselines=False))
    assert set(alone.scores) == SYSTEM_KEYS | JUDGE_KEYS
    assert all(alone.scores[key] == evaluation.scores[key] for key in alone.scores)
    assert {sample.system for sample in alone.samples} == {"prefix"}


def test_every_score_of_texts_knows_how_far_each_of_them_moves_it(evaluation):
    without = {key for key, score in evaluation.scores.items() if not score.influence}
    assert {key.rpartition(".")[2] for key in without} <= {"trainable_parameters", "longest_copy"}
    for key, moved in evaluation.to_influences().items():
        assert sum(moved) == pytest.approx(0.0, abs=1e-4 * max(1.0, abs(evaluation.scores[key].value))), key


def test_without_samples_no_key_needs_texts(base, prefix, data):
    found = evaluate(base, prefix, data, make_recipe(samples=0))
    of_losses = {system + key for system in ("", "base.", "instruction.") for key in SYSTEM_KEYS - TEXT_KEYS}
    assert set(found.scores) == of_losses | STEERING_KEYS
    assert found.samples == ()


def test_without_labels_or_instruction_their_keys_are_absent(base, prefix, data):
    bare = dataclasses.replace(data, contrast=(), judge_rows=(), judge_test_rows=(), kept_label=None)
    found = evaluate(base, prefix, bare, make_recipe(instruction=None))
    absent = {"heldout_nll_negative", "steering_gap", "sentiment_accuracy"}
    expected = {system + key for system in ("", "base.") for key in SYSTEM_KEYS - absent}
    assert set(found.scores) == expected | (REAL_KEYS - {"real.sentiment_accuracy"})
    assert {(sample.is_wanted, sample.probability) for sample in found.samples} == {(None, None)}


def test_the_judge_can_be_left_out(base, prefix, data):
    found = evaluate(base, prefix, data, make_recipe(judge=False, instruction=None))
    assert not {"sentiment_accuracy", *JUDGE_KEYS} & set(found.scores)
    assert "steering_gap" in found.scores


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([LabelledText("good film", "positive")] * 5, "at least 20 labelled rows, got 5"),
        ([LabelledText(f"good film {i % 2}", "ab"[i % 2]) for i in range(30)], "knows the labels a, b, not 'positive'"),
    ],
)
def test_a_judge_that_cannot_be_trained_is_left_out_with_a_warning(base, prefix, data, caplog, rows, reason):
    few = dataclasses.replace(data, judge_rows=tuple(rows))
    with caplog.at_level(logging.WARNING):
        found = evaluate(base, prefix, few, make_recipe(instruction=None))
    assert not {"sentiment_accuracy", *JUDGE_KEYS} & set(found.scores)
    assert f"sentiment is not measured: the judge {'needs ' if 'least' in reason else ''}{reason}" in caplog.text


def test_texts_that_are_all_empty_have_no_fluency(base, prefix, data, caplog, monkeypatch):
    monkeypatch.setattr(writing, "generate_texts", lambda base, prompts, settings, **options: [""] * len(prompts))
    with caplog.at_level(logging.WARNING):
        found = evaluate(base, prefix, data, make_recipe(instruction=None))
    assert "prefix: every text it wrote is empty; fluency is left out" in caplog.text
    assert found.scores["sentiment_accuracy"].value == 0
    assert found.scores["longest_copy"].value == 0
    assert found.scores["real.novelty"].value > 0
    assert not {"fluency_ppl", "repetition", "distinct_1", "self_bleu", "novelty"} & set(found.scores)


def test_prompts_are_taken_in_turn(base, prefix, data):
    found = evaluate(base, prefix, data, make_recipe(prompts=["the film", "it"], samples=5, instruction=None))
    assert [s.prompt for s in found.samples if s.system == "base"] == ["the film", "it", "the film", "it", "the film"]


def test_rows_are_picked_whatever_their_order(data):
    assert pick(data.test, 5) == pick(data.test[::-1], 5)
    assert pick(data.test, 5) == pick(data.test, 12)[:5]
    assert len(pick(data.test, 99)) == 12
    assert pick(data.test, 12) != list(data.test)


@pytest.fixture
def questions(base, data):
    """Held-out rows with two inputs of three answers each, and six of one."""

    def row(prompt, text):
        read, learned = (tuple(base.tokenizer(each)["input_ids"]) for each in (prompt, text))
        return Example(prompt, text, read + learned, (-100,) * len(read) + learned)

    texts = [example.text for example in data.test]
    prompts = ["the film :"] * 3 + ["the plot :"] * 3 + [f"{word} movie :" for word in "a an the my this that".split()]
    return dataclasses.replace(data, test=tuple(map(row, prompts, texts)), contrast=(), kept_label=None)


def asking(**evaluation):
    recipe = make_recipe(**evaluation)
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"format": Format.INPUT_TARGET}),
            "generation": recipe.generation.model_copy(update={"temperature": 0}),
        }
    )


METRIC_KEYS = {"bleu", "chrf", "nist", "rouge_1", "rouge_2", "rouge_l", "meteor"}


class Lengths(BertScorer):
    """Stands for an encoder: tells every text by its length, and its references by how many they are."""

    def __init__(self):
        """Load nothing."""

    def f1(self, texts, references, told):
        told(len(texts), len(texts))
        return [len(own) + 0.001 * len(text) for text, own in zip(texts, references, strict=True)]


def test_answers_are_compared_in_hidden_states_where_an_encoder_is_named(base, prefix, questions, monkeypatch):
    monkeypatch.setattr("prefixkit.evaluation.protocol.load_scorer", lambda settings: Lengths())
    told = []
    recipe = asking(samples=99, bertscore_model="an encoder", bertscore_layer=1)
    found = evaluate(base, prefix, questions, recipe, on_progress=lambda *done: told.append(done))
    for key, system in (("", "prefix"), ("base.", "base"), ("instruction.", "instruction")):
        own = [sample for sample in found.samples if sample.system == system]
        expected = np.mean([len(sample.references) + 0.001 * len(sample.text) for sample in own])
        assert found.scores[f"{key}bertscore"].value == pytest.approx(expected)
    assert told[-1][1] == told[-1][2]
    assert "base: BERTScore" in {words for words, *_ in told}


def test_answers_are_compared_with_all_that_people_wrote(base, prefix, questions):
    found = evaluate(base, prefix, questions, asking(samples=99))
    for system in ("prefix", "base", "instruction"):
        own = [sample for sample in found.samples if sample.system == system]
        assert sorted(sample.prompt for sample in own) == sorted({example.prompt for example in questions.test})
        for sample in own:
            answers = sorted(example.text for example in questions.test if example.prompt == sample.prompt)
            assert sorted(sample.references) == answers
        key = "" if system == "prefix" else f"{system}."
        texts, references = [sample.text for sample in own], [sample.references for sample in own]
        assert found.scores[f"{key}bleu"].value == bleu_sums(texts, references).value
        assert found.scores[f"{key}chrf"].value == chrf_sums(texts, references).value > 0
        assert found.scores[f"{key}nist"].value == word_nist_sums(texts, references).value
        assert found.scores[f"{key}meteor"].value == pytest.approx(np.mean(meteor_scores(texts, references)))
        for name, values in rouge_scores(texts, references).items():
            assert found.scores[f"{key}{name}"].value == pytest.approx(np.mean(values))
        for name in METRIC_KEYS:
            score = found.scores[key + name]
            assert score.interval.low <= score.value <= score.interval.high
    assert not {f"real.{key}" for key in METRIC_KEYS} & set(found.scores)


def test_greedy_answers_are_written_once_per_input(base, prefix, questions, monkeypatch):
    asked = []
    real = writing.generate_texts

    def noted(base, prompts, settings, **options):
        asked.append(prompts)
        return real(base, prompts, settings, **options)

    monkeypatch.setattr(writing, "generate_texts", noted)
    evaluate(base, prefix, questions, asking(samples=5, instruction=None))
    assert asked[0] == asked[1]
    assert len(asked[0]) == len(set(asked[0])) == 5


def test_only_the_metrics_asked_for_are_measured(base, prefix, questions):
    found = evaluate(base, prefix, questions, asking(metrics=["rouge"], instruction=None))
    assert set(found.scores) & METRIC_KEYS == {"rouge_1", "rouge_2", "rouge_l"}
    none = evaluate(base, prefix, questions, asking(metrics=[], instruction=None))
    assert not set(none.scores) & METRIC_KEYS
    assert none.samples[0].references


@pytest.mark.parametrize("metrics", [["bleu", "chrf"], []])
def test_progress_with_references_runs_from_nothing_to_everything(base, prefix, questions, metrics):
    calls = []
    recipe = asking(metrics=metrics)
    evaluate(base, prefix, questions, recipe, on_progress=lambda words, done, total: calls.append((words, done, total)))
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert calls[0] == ("prefix: held-out loss", 0, 3 * (8 + 3 * 6) + 6)
    assert done[-1] == calls[0][2]
    assert "base: references" in {words for words, _, _ in calls}


def test_progress_runs_from_nothing_to_everything(base, prefix, data):
    calls = []
    evaluate(
        base, prefix, data, make_recipe(), on_progress=lambda words, done, total: calls.append((words, done, total))
    )
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert calls[0] == ("prefix: held-out loss", 0, 3 * (8 + 6 + 2 * 6) + 6)
    assert done[-1] == calls[0][2]
    assert {words for words, _, _ in calls} >= {"base: writing", "instruction: fluency"}
