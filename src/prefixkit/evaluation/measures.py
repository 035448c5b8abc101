"""From losses and texts to scores: every key of scores.json is made here, once, for any system."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefixkit.config import EvaluationConfig, Metric
from prefixkit.data import LabelledText
from prefixkit.evaluation.answers import Answers
from prefixkit.evaluation.copying import Copying
from prefixkit.evaluation.diversity import Distinct, SelfBleu
from prefixkit.evaluation.intervals import (
    Interval,
    Numbers,
    Ratio,
    Sums,
    difference_interval,
    jackknife_influence,
    jackknife_interval,
    left_out_values,
    ratio_interval,
    share_interval,
    sums_interval,
)
from prefixkit.evaluation.judge import SentimentJudge
from prefixkit.evaluation.loss import TokenLosses
from prefixkit.evaluation.overlap import (
    References,
    bleu_sums,
    chrf_sums,
    meteor_scores,
    rouge_scores,
    usable_metrics,
    word_nist_sums,
)
from prefixkit.evaluation.progress import OnTexts
from prefixkit.evaluation.repetition import repetition
from prefixkit.evaluation.scores import Score
from prefixkit.seeding import derive

Scores = dict[str, Score]

#: Measures of a set of texts, which depend on how many those are.
SET_MEASURES = frozenset({"distinct_1", "distinct_2", "distinct_3", "self_bleu", "longest_copy"})


@dataclass(frozen=True)
class HeldOutLosses:
    """What held-out rows cost one system.

    Attributes:
        wanted: rows of the kind that was learned.
        contrast: rows of other labels; None where there are none.
    """

    wanted: TokenLosses
    contrast: TokenLosses | None


@dataclass(frozen=True)
class Measures:
    """Makes scores with intervals.

    A measure draws the same resamples for every system, from a stream of its own.

    Attributes:
        settings: number of resamples, and the seed.
    """

    settings: EvaluationConfig

    def heldout(self, losses: HeldOutLosses) -> Scores:
        """Return loss and perplexity, of the texts' second halves too, and the gap to texts of other labels if any."""
        scores = {"heldout_nll": self._ratio("heldout_nll", losses.wanted.ratio)}
        scores["heldout_ppl"] = _exp(scores["heldout_nll"])
        late = losses.wanted.late
        if late is not None and any(late.tokens):
            scores["heldout_nll_late"] = self._ratio("heldout_nll_late", late.ratio)
            scores["late_gap"] = self._sums("late_gap", _late_gap(late, losses.wanted.early))
        if losses.contrast is not None:
            scores["heldout_nll_negative"] = self._ratio("heldout_nll_negative", losses.contrast.ratio)
            scores["steering_gap"] = self._difference("steering_gap", losses.contrast.ratio, losses.wanted.ratio)
        return scores

    def steering(self, losses: HeldOutLosses, base: HeldOutLosses) -> Scores:
        """Return how much more a system gains over the base model on wanted than on contrasting texts.

        That is its steering gap minus the base model's. Both read the same texts, so what makes one text harder
        than another cancels out, and the interval is far narrower than that of either gap.
        """
        if losses.contrast is None or base.contrast is None:
            return {}
        wanted, contrast = base.wanted.minus(losses.wanted), base.contrast.minus(losses.contrast)
        return {"steering": self._difference("steering", wanted, contrast)}

    def judge(self, judge: SentimentJudge, rows: Sequence[LabelledText]) -> Scores:
        """Return how often the judge is right about real texts, whole and cut to a generation's length."""
        return {
            "judge_accuracy": self._share(judge.correct(rows)),
            "judge_accuracy_short": self._share(judge.correct(rows, cut=True)),
        }

    def sentiment(self, is_wanted: Sequence[bool]) -> Scores:
        """Return the share of generated texts that the judge gives the wanted label."""
        return {"sentiment_accuracy": self._share(is_wanted)}

    def fluency(self, losses: TokenLosses) -> Scores:
        """Return the perplexity of generated texts."""
        return {"fluency_ppl": _exp(self._ratio("fluency_ppl", losses.ratio))}

    def texts(self, texts: Sequence[str]) -> Scores:
        """Return what the texts alone show: repetition and diversity.

        Sets without a single n-gram of a measure's length have no score for it.
        """
        scores: Scores = {}
        repeated = repetition(texts)
        if any(repeated.weights):
            scores["repetition"] = self._ratio("repetition", repeated)
        for n in (1, 2, 3):
            distinct = Distinct(texts, n)
            if distinct.ngrams:
                scores[f"distinct_{n}"] = self._set(f"distinct_{n}", texts, distinct, high=1.0)
        if len(texts) > 1 and any(texts):
            scores["self_bleu"] = self._set("self_bleu", texts, SelfBleu(texts), high=100.0)
        return scores

    def copying(self, copies: Sequence[Copying]) -> Scores:
        """Return novelty, and the most words in a row that any text took from a training text."""
        longest = max((copy.longest.words for copy in copies if copy.longest is not None), default=0)
        scores: Scores = {"longest_copy": Score(longest)}
        novelty = Ratio(tuple(float(copy.novel) for copy in copies), tuple(float(copy.ngrams) for copy in copies))
        if any(novelty.weights):
            scores["novelty"] = self._ratio("novelty", novelty)
        return scores

    def overlap(self, texts: Sequence[str], references: References, told: OnTexts) -> Scores:
        """Return how near answers come to all that people wrote for the same inputs; intervals are over inputs.

        Raises:
            ConfigError: a metric was asked for by name and its package is not installed.
        """
        scores: Scores = {}
        metrics = usable_metrics(self.settings)
        for done, metric in enumerate(metrics, start=1):
            match metric:
                case Metric.BLEU:
                    scores["bleu"] = self._sums("bleu", bleu_sums(texts, references))
                case Metric.CHRF:
                    scores["chrf"] = self._sums("chrf", chrf_sums(texts, references))
                case Metric.ROUGE:
                    scores |= {key: self._mean(key, own) for key, own in rouge_scores(texts, references).items()}
                case Metric.METEOR:
                    scores["meteor"] = self._mean("meteor", meteor_scores(texts, references))
                case Metric.NIST:
                    scores["nist"] = self._sums("nist", word_nist_sums(texts, references))
            told(len(texts) * done // len(metrics), len(texts))
        told(len(texts), len(texts))  # there may be no metric at all
        return scores

    def bertscore(self, f1: Sequence[float]) -> Scores:
        """Return BERTScore, from the F1 of every text."""
        return {"bertscore": self._mean("bertscore", f1)}

    def labels(self, answers: Answers) -> Scores:
        """Return the loss per label, accuracy, and F1 over classes, and over entities where tags mark some."""
        rows, hits = range(len(answers.logs)), answers.hits
        is_whole = set(hits.weights) == {1.0}
        scores = {
            "heldout_nll": self._ratio("heldout_nll", answers.losses),
            "accuracy": self._share([hit == 1 for hit in hits.parts]) if is_whole else self._ratio("accuracy", hits),
            "macro_f1": self._set("macro_f1", rows, answers.macro_f1, high=1.0),
        }
        if answers.has_entities:
            scores["entity_f1"] = self._set("entity_f1", rows, answers.entity_f1, high=1.0)
        return scores

    def _share(self, hits: Sequence[bool]) -> Score:
        return Score(sum(hits) / len(hits), share_interval(hits), _kept(Ratio.mean(hits).influence))

    def _mean(self, key: str, values: Sequence[float]) -> Score:
        return self._ratio(key, Ratio.mean(values))

    def _ratio(self, key: str, ratio: Ratio) -> Score:
        interval = ratio_interval(ratio, resamples=self.settings.bootstrap, seed=self._seed(key))
        return Score(ratio.value, interval, _kept(ratio.influence))

    def _sums(self, key: str, sums: Sums) -> Score:
        interval = sums_interval(sums, resamples=self.settings.bootstrap, seed=self._seed(key))
        return Score(sums.value, interval, _kept(sums.influence))

    def _difference(self, key: str, first: Ratio, second: Ratio) -> Score:
        interval = difference_interval(first, second, resamples=self.settings.bootstrap, seed=self._seed(key))
        are_known = min(len(first.parts), len(second.parts)) > 1
        moved = np.concatenate([first.influence, -second.influence])
        return Score(first.value - second.value, interval, _kept(moved) if are_known else ())

    def _set(
        self, key: str, texts: Sequence[Any], statistic: Callable[[Sequence[int]], float], *, high: float
    ) -> Score:
        value, left_out = statistic(range(len(texts))), left_out_values(texts, statistic, seed=self._seed(key))
        moved = () if left_out is None else _kept(jackknife_influence(left_out))
        return Score(value, jackknife_interval(value, left_out, low=0.0, high=high), moved)

    def _seed(self, key: str) -> int:
        return derive(self.settings.seed, f"interval/{key}")


def _late_gap(late: TokenLosses, early: TokenLosses) -> Sums:
    """Return what second halves cost more than first ones per token; both of a text are drawn together."""
    parts = np.array([late.nats, late.tokens, early.nats, early.tokens], dtype=np.float64).T

    def gap(sums: Numbers) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):  # texts of one token may be drawn alone
            return float(sums[0] / sums[1] - sums[2] / sums[3])

    return Sums(parts, gap)


def _exp(score: Score) -> Score:
    interval: Interval | None = None if score.interval is None else score.interval.map(math.exp)
    value = math.exp(score.value)
    return Score(value, interval, tuple(value * each for each in score.influence))


def _kept(influence: Numbers) -> tuple[float, ...]:
    """Return influences as a score keeps them; none of a single text, or of a measure undefined without some text."""
    return tuple(influence.tolist()) if len(influence) > 1 and np.isfinite(influence).all() else ()
