"""The protocol where labels are learned: systems, baselines, predictions."""

import dataclasses

import numpy as np
import pytest
import torch

from prefixkit.config import validate_recipe
from prefixkit.data import Example
from prefixkit.errors import EvaluationError
from prefixkit.evaluation import evaluate_labels, label_losses, labels, validation_rows
from prefixkit.injection import attach
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import Head, HeadKind, Prefix

LABELS = ("bad", "good", "never")


@pytest.fixture
def labelled(data, base, write_review):
    """Reviews that end in the token their label is asked at; no row has the third label."""

    def examples(start, count):
        made = []
        for number in range(start, start + count):
            label = number % 3 == 0
            text = write_review("positive" if label else "negative", number, 12)
            ids = (*base.tokenizer(text)["input_ids"], 2)
            made.append(Example("", text, ids, (*[-100] * (len(ids) - 1), int(label))))
        return tuple(made)

    return dataclasses.replace(
        data, train=examples(0, 60), validation=examples(100, 10), test=examples(200, 30), contrast=(),
        judge_rows=(), judge_test_rows=(), kept_label=None, classes=LABELS,
    )  # fmt: skip


@pytest.fixture
def own(prefix):
    dice = torch.Generator().manual_seed(2)
    head = Head(HeadKind.SEQUENCE, LABELS, 0.1 * torch.randn(3, 32, generator=dice), torch.zeros(3))
    return Prefix.from_states(prefix.states, base=prefix.card.base, head=head)


RECIPE = validate_recipe({
    "data": {"format": "classes", "label_column": "label"}, "train": {"steps": 10, "batch_size": 5},
    "evaluation": {"heldout_rows": 20, "bootstrap": 100},
})  # fmt: skip


def test_losses_are_those_of_each_text_alone(base, labelled, own):
    found = label_losses(base, labelled.test[:5], own)
    for example, nats in zip(labelled.test[:5], found.nats, strict=True):
        with torch.no_grad(), attach(base.model, own):
            hidden = inspect_model(base.model).stack(input_ids=torch.tensor([example.input_ids]), use_cache=False)[0]
        logits = own.head.weight.double() @ hidden[0, -1] + own.head.bias.double()
        expected = logits.exp().sum().log() - logits[example.labels[-1]]
        assert nats == pytest.approx(float(expected), abs=1e-5)  # the head is float32
    assert found.tokens == (1,) * 5


def test_four_systems_are_measured_on_the_same_texts(base, labelled, own):
    found = evaluate_labels(base, own, labelled, RECIPE)
    for system in ("", "head.", "words.", "majority."):
        assert {f"{system}{key}" for key in ("accuracy", "macro_f1", "heldout_nll")} <= set(found.scores)
    assert found.scores["trainable_parameters"].value == 5 * 2 * 2 * 2 * 16 // 2 + 3 * 32 + 3
    assert len(found.predictions) == 20
    right = [line.labels == line.predicted for line in found.predictions]
    assert found.scores["accuracy"].value == pytest.approx(np.mean(right))
    # the words say it all, and the commonest label is the bad one
    assert found.scores["words.accuracy"].value == 1.0
    assert found.scores["majority.accuracy"].value == pytest.approx(
        np.mean([line.labels == ("bad",) for line in found.predictions])
    )


def test_the_commonest_label_costs_what_its_share_says(base, labelled, own):
    found = evaluate_labels(base, own, labelled, RECIPE)
    goods = [line.labels == ("good",) for line in found.predictions]
    shares = [1 / 3, 2 / 3]  # of the 50 rows training saw, by content hash: near the data's own
    expected = np.mean([-np.log(shares[0] if good else shares[1]) for good in goods])
    assert found.scores["majority.heldout_nll"].value == pytest.approx(expected, abs=0.05)


def test_baselines_learn_from_as_many_rows_as_training_saw(base, labelled, own):
    few = RECIPE.model_copy(update={"train": RECIPE.train.model_copy(update={"steps": 4})})  # 20 rows
    every = evaluate_labels(base, own, labelled, RECIPE).scores
    less = evaluate_labels(base, own, labelled, few).scores
    assert less["head.heldout_nll"].value != every["head.heldout_nll"].value
    assert less["heldout_nll"].value == every["heldout_nll"].value


def test_the_same_arguments_give_the_same_scores(base, labelled, own):
    one, other = (evaluate_labels(base, own, labelled, RECIPE).to_flat() for _ in range(2))
    assert one == other


def test_progress_reaches_its_end(base, labelled, own):
    told = []
    evaluate_labels(base, own, labelled, RECIPE, on_progress=lambda *line: told.append(line))
    assert told[-1][1] == told[-1][2]
    assert [line[1] for line in told] == sorted(line[1] for line in told)


def test_a_loss_that_is_no_number_is_refused(base, labelled, own):
    broken = dataclasses.replace(own, head=dataclasses.replace(own.head, weight=own.head.weight * float("nan")))
    expected = (
        "^the loss of a held-out text is not finite: the artefact is damaged or the dtype too narrow; try "
        "model.dtype=float32$"
    )
    with pytest.raises(EvaluationError, match=expected):
        label_losses(base, labelled.test, broken)


def test_early_stopping_looks_at_rows_of_every_kind_even_if_the_file_is_sorted(labelled):
    by_label = sorted(labelled.validation * 5, key=lambda example: example.labels[-1])
    ordered = dataclasses.replace(labelled, validation=tuple(by_label))
    recipe = RECIPE.model_copy(update={"train": RECIPE.train.model_copy(update={"validation_rows": 30})})
    assert len({example.labels[-1] for example in by_label[:30]}) == 1
    assert len({example.labels[-1] for example in validation_rows(ordered, recipe)}) == 2
    text = dataclasses.replace(ordered, classes=())  # texts may be sorted by topic as well
    assert validation_rows(text, recipe) == validation_rows(ordered, recipe)


def test_a_head_for_other_labels_or_none_is_refused(base, labelled, own, prefix):
    other = dataclasses.replace(labelled, classes=("a", "b", "c"))
    with pytest.raises(EvaluationError, match=r"^the head knows the labels bad, good, never, the data have a, b, c; "):
        evaluate_labels(base, own, other, RECIPE)
    with pytest.raises(EvaluationError, match=r"^this artefact learned text and has no head"):
        label_losses(base, labelled.test, prefix)


def test_baselines_learn_from_no_more_labels_than_they_may(base, labelled, own, monkeypatch):
    """Rows of many words would otherwise give one baseline more than the other."""
    seen = []
    monkeypatch.setattr(labels, "_MOST_LABELS", 7)
    monkeypatch.setattr(labels, "words_alone", lambda rows, *_: seen.append(len(rows)))
    evaluate_labels(base, own, labelled, RECIPE)
    assert seen == [7]
