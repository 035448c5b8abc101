"""Each metric is its own library's, on all references of each text."""

import logging

import pytest
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from prefixkit.config import EvaluationConfig, Metric, validate_recipe
from prefixkit.errors import ConfigError
from prefixkit.evaluation import check_metrics, overlap, sums_interval
from prefixkit.evaluation.overlap import (
    bleu_sums,
    chrf_sums,
    meteor_scores,
    rouge_scores,
    usable_metrics,
    word_nist_sums,
)

TEXTS = [
    "The Vaults is a cheap pub near Café Adriatic.",
    "Serving Italian food, Zizzi has a low rating.",
    "It is not family-friendly.",
    "",
]
REFERENCES = [
    ["The Vaults pub near Café Adriatic is cheap.", "Near Café Adriatic there is a cheap pub called The Vaults."],
    ["Zizzi serves Italian food and has low ratings."],
    ["it isn't family friendly.", "IT IS NOT FAMILY-FRIENDLY.", "Families are not welcome."],
    ["Nothing is known."],
]
#: The same as sacrebleu wants them.
COLUMNS = [
    [own[place] if place < len(own) else None for own in REFERENCES] for place in range(max(map(len, REFERENCES)))
]


@pytest.mark.parametrize(
    ("sums", "metric"), [(bleu_sums, BLEU(lowercase=True)), (chrf_sums, CHRF())], ids=["bleu", "chrf"]
)
def test_corpus_scores_are_sacrebleus(sums, metric):
    found = sums(TEXTS, REFERENCES)
    assert found.value == pytest.approx(metric.corpus_score(TEXTS, COLUMNS).score, abs=1e-12)
    for places in ([0, 0, 2, 3], [1, 2, 2, 2]):  # as a resample has them
        chosen = [[column[place] for place in places] for column in COLUMNS]
        expected = metric.corpus_score([TEXTS[place] for place in places], chosen).score
        assert found.measure(found.parts[places].sum(axis=0)) == pytest.approx(expected, abs=1e-12)
    interval = sums_interval(found, resamples=100, seed=0)
    assert interval.low < found.value < interval.high


def test_bleu_by_hand():
    """The last of five words is wrong: right are 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples."""
    found = bleu_sums(["a b c d x"], [["a b c d e", "nothing like it"]])
    assert found.value == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_every_reference_of_a_text_counts():
    """Words of both references make a BLEU that neither of them makes alone."""
    text, first, second = ["a b c d e f g h"], "a b c d x x x x", "x x x x e f g h"
    alone = [bleu_sums(text, [[reference]]).value for reference in (first, second)]
    assert bleu_sums(text, [[first, second]]).value > max(alone)


def test_case_does_not_count_in_bleu_and_nist_as_in_the_e2e_script():
    shouted = [text.upper() for text in TEXTS]
    for sums in (bleu_sums, word_nist_sums):
        assert sums(shouted, REFERENCES).value == sums(TEXTS, REFERENCES).value > 0
    assert chrf_sums(shouted, REFERENCES).value < chrf_sums(TEXTS, REFERENCES).value


def test_rouge_is_that_of_the_reference_that_fits_best():
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    found = rouge_scores(TEXTS, REFERENCES)
    for key, name in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        singles = [[scorer.score(each, text)[name].fmeasure for each in own]
                   for text, own in zip(TEXTS, REFERENCES, strict=True)]  # fmt: skip
        assert found[key] == [max(own) for own in singles]
    by_hand = rouge_scores(["a pub serves food"], [["the pub serves food"]])
    assert [by_hand[key][0] for key in ("rouge_1", "rouge_2", "rouge_l")] == pytest.approx([3 / 4, 2 / 3, 3 / 4])


def test_meteor_by_hand_knows_stems_and_no_synonyms():
    """Lavie & Agarwal (2007), §2.2: four matches of four in one piece are penalised by 0.5 * (1 / 4) ** 3."""
    whole = 1 - 0.5 * (1 / 4) ** 3
    assert meteor_scores(["the pub serves food"], [["the pub served food"]]) == pytest.approx([whole])
    # three of four in two pieces: precision and recall are equal, and so is their mean
    assert meteor_scores(["the inn serves food"], [["the pub serves food"]]) == pytest.approx(
        [3 / 4 * (1 - 0.5 * (2 / 3) ** 3)]
    )
    assert meteor_scores([""], [["the pub"]]) == [0]


def test_meteor_is_nltks_where_it_finds_no_synonym():
    class Empty:
        def synsets(self, word):
            return []

    text, references = "the vaults is a cheap pub", ["the vaults pub is cheap", "there is a cheap pub"]
    own = meteor_score([each.split() for each in references], text.split(), wordnet=Empty())
    assert meteor_scores([text], [references]) == [own]


def test_words_are_told_from_punctuation_before_they_are_matched():
    assert meteor_scores(["It is cheap."], [["it is cheap ."]])[0] > 0.99
    assert word_nist_sums(["It is cheap."], [["it is cheap ."]]).value == word_nist_sums(
        ["it is cheap ."], [["it is cheap ."]]
    ).value  # fmt: skip


@pytest.fixture
def without(monkeypatch):
    """Make modules look as if they were not installed."""

    def hide(*modules):
        real = overlap.find_spec
        monkeypatch.setattr(overlap, "find_spec", lambda name: None if name in modules else real(name))

    return hide


def make_recipe(**evaluation):
    return validate_recipe({"data": {"format": "input_target"}, "evaluation": evaluation})


def test_left_open_all_metrics_are_measured_whose_packages_are_there(without):
    assert usable_metrics(EvaluationConfig()) == tuple(Metric)
    without("rouge_score")
    assert Metric.ROUGE not in usable_metrics(EvaluationConfig())
    assert usable_metrics(EvaluationConfig(metrics=["nist", "bleu", "nist"])) == (Metric.NIST, Metric.BLEU)
    assert usable_metrics(EvaluationConfig(metrics=[])) == ()


def test_a_metric_that_was_asked_for_and_has_no_package_is_refused_with_the_extra(without):
    without("rouge_score", "nltk")
    check_metrics(make_recipe(metrics=["bleu", "chrf", "nist"]))
    for name, package in (("rouge", "rouge-score"), ("meteor", "nltk")):
        with pytest.raises(ConfigError) as caught:
            check_metrics(make_recipe(metrics=["bleu", name]))
        assert str(caught.value) == (
            f"evaluation.metrics: {name} needs {package}, which is not installed; "
            f"pip install 'prefixkit[metrics]', or leave {name} out"
        )


def test_what_will_not_be_measured_is_said_where_inputs_are_answered(without, caplog):
    without("rouge_score", "nltk")
    with caplog.at_level(logging.WARNING):
        check_metrics(validate_recipe({}))
        check_metrics(make_recipe(samples=0))
        check_metrics(make_recipe(metrics=["bleu"]))
        assert caplog.messages == []
        check_metrics(make_recipe())
    assert caplog.messages == [
        "not measured for want of a package: rouge (rouge-score), meteor (nltk); pip install 'prefixkit[metrics]'"
    ]


@pytest.mark.parametrize(
    ("reference", "other"),
    [
        ("这家酒店离市中心很近，价格便宜，服务也很好。", "我昨天在图书馆借了三本关于历史的书。"),
        ("このホテルは駅から近くて、値段も安いです。", "きのう図書館で歴史の本を三冊借りました。"),
        ("Этот отель находится рядом с вокзалом и стоит недорого.", "Вчера друг взял в библиотеке три книги о войне."),
        ("Das schöne Hotel liegt günstig am Fluß.", "Gestern lieh meine Tante drei Bücher über Geschichte."),
    ],
)
def test_an_answer_in_any_script_is_as_near_as_it_is(reference, other):
    """The reference itself comes out at the top, and a sentence about something else far below it."""
    same, far = ([text] for text in (reference, other))
    assert bleu_sums(same, [same]).value == pytest.approx(100.0)
    assert bleu_sums(far, [same]).value < 30
    assert all(values == [pytest.approx(1.0)] for values in rouge_scores(same, [same]).values())
    assert all(values[0] < 0.5 for values in rouge_scores(far, [same]).values())
    assert meteor_scores(same, [same])[0] > 0.95
    assert meteor_scores(far, [same])[0] < 0.5
    assert word_nist_sums(same, [same]).value > 2 * word_nist_sums(far, [same]).value


def test_words_of_a_to_z_are_rouge_scores_own():
    """Stems and all, beside punctuation of any kind."""
    texts = ["The hotel’s rooms were cleaned — twice!", "It's cheap; 100% recommended..."]
    references = [["Rooms at the hotel’s are cleaned"], ["recommending its cheapness"]]
    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    expected = [scorer.score_multi(own, text)["rouge1"].fmeasure for text, own in zip(texts, references, strict=True)]
    assert rouge_scores(texts, references)["rouge_1"] == pytest.approx(expected)
