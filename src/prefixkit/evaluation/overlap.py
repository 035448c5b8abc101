"""How near texts come to what people wrote for the same inputs, by the field's own tools.

    BLEU     sacrebleu (Papineni et al., 2002; Post, 2018): 13a tokens, lower case, all references together
    chrF     sacrebleu (Popović, 2015): character n-grams up to 6, beta 2, the best reference
    NIST     `nist.py`, on the tokens BLEU has
    ROUGE    rouge-score (Lin, 2004): F1 of words, of pairs, of the longest common sequence; stems, the best reference
    METEOR   nltk (Lavie & Agarwal, 2007): words that are equal or of one stem, on BLEU's tokens, the best reference

BLEU and NIST are without case as in the script of the E2E challenge, which Li & Liang (2021, §5.1) use.

Texts in scripts without spaces are read by sacrebleu's tokenizer for those (`words.tokenizer_of`), by the script of the
references. rouge-score's own words are of the letters a to z; texts with others are read by `split_words`.

METEOR also matches synonyms where it has WordNet, which is no package. Here it never does, whether WordNet is installed
or not: the number is lower than one with synonyms, and the same on every machine.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import zip_longest

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from prefixkit.compat import score_of_statistics, sentence_statistics
from prefixkit.config import EvaluationConfig, Metric, Recipe
from prefixkit.errors import ConfigError
from prefixkit.evaluation.asking import answers_inputs
from prefixkit.evaluation.bertscore import check_scorer
from prefixkit.evaluation.intervals import Numbers, Sums
from prefixkit.evaluation.nist import nist_sums
from prefixkit.evaluation.words import split_words, tokenizer_of
from prefixkit.logs import get_logger

log = get_logger(__name__)

#: The package and module behind a metric that is none of prefixkit's own dependencies.
_PACKAGES = {Metric.ROUGE: ("rouge-score", "rouge_score"), Metric.METEOR: ("nltk", "nltk")}

References = Sequence[Sequence[str]]
"""Of each text all its references, at least one."""


def usable_metrics(settings: EvaluationConfig) -> tuple[Metric, ...]:
    """Return the metrics to measure: those that were asked for, or all whose packages are installed.

    Raises:
        ConfigError: one was asked for by name and its package is not installed.
    """
    missing = {metric: package for metric, (package, module) in _PACKAGES.items() if find_spec(module) is None}
    asked = tuple(Metric) if settings.metrics is None else tuple(dict.fromkeys(settings.metrics))
    for metric in asked if settings.metrics is not None else ():
        if metric in missing:
            raise ConfigError(
                f"evaluation.metrics: {metric} needs {missing[metric]}, which is not installed; "
                f"pip install 'prefixkit[metrics]', or leave {metric} out"
            )
    return tuple(metric for metric in asked if metric not in missing)


def check_metrics(recipe: Recipe) -> None:
    """Say before training which metrics will be missing afterwards.

    Raises:
        ConfigError: one of them was asked for by name; or BERTScore cannot be measured.
        ModelError: there is no such model for BERTScore.
    """
    settings = recipe.evaluation
    if settings.bertscore_model is not None and settings.samples:
        if not answers_inputs(recipe):
            raise ConfigError(
                "evaluation.bertscore_model: compares answers with references, and nothing is answered here; leave it "
                "out"
            )
        check_scorer(settings)
    absent = [metric for metric in Metric if metric not in usable_metrics(settings)]
    if absent and settings.metrics is None and answers_inputs(recipe):
        listed = ", ".join(f"{metric} ({_PACKAGES[metric][0]})" for metric in absent)
        log.warning("not measured for want of a package: %s; pip install 'prefixkit[metrics]'", listed)


def bleu_sums(texts: Sequence[str], references: References) -> Sums:
    """Return corpus BLEU, 0 to 100."""
    return _sacrebleu(BLEU(lowercase=True, tokenize=_tokenizer(references)), texts, references)


def chrf_sums(texts: Sequence[str], references: References) -> Sums:
    """Return corpus chrF, 0 to 100."""
    return _sacrebleu(CHRF(), texts, references)


def word_nist_sums(texts: Sequence[str], references: References) -> Sums:
    """Return NIST of texts as they were written."""
    words = _Words(references)
    return nist_sums(
        [words(text.lower()) for text in texts], [[words(each.lower()) for each in own] for own in references]
    )


def rouge_scores(texts: Sequence[str], references: References) -> dict[str, list[float]]:
    """Return ROUGE-1, ROUGE-2 and ROUGE-L of every text, 0 to 1, by their keys in scores.json."""
    from rouge_score.rouge_scorer import RougeScorer

    keys = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
    scorer = RougeScorer(list(keys), tokenizer=_RougeWords())
    found = [scorer.score_multi(own, text) for text, own in zip(texts, references, strict=True)]
    return {key: [float(each[name].fmeasure) for each in found] for name, key in keys.items()}


class _NoSynonyms:
    """Stands where nltk expects WordNet, and knows no word."""

    def synsets(self, word: str) -> list[object]:
        """Return no meaning of a word."""
        return []


def meteor_scores(texts: Sequence[str], references: References) -> list[float]:
    """Return METEOR of every text without synonyms, 0 to 1."""
    from nltk.translate.meteor_score import meteor_score

    words = _Words(references)
    return [
        float(meteor_score([words(each) for each in own], words(text), wordnet=_NoSynonyms()))
        for text, own in zip(texts, references, strict=True)
    ]


def _sacrebleu(metric: BLEU | CHRF, texts: Sequence[str], references: References) -> Sums:
    # sacrebleu wants the first reference of every text, then the second..., and None where a text has fewer
    columns = [list(column) for column in zip_longest(*references)]
    statistics = sentence_statistics(metric, texts, columns)

    def measure(sums: Numbers) -> float:
        return score_of_statistics(metric, sums.astype(np.int64).tolist())

    return Sums(np.array(statistics, dtype=np.float64), measure)


def _tokenizer(references: References) -> str:
    return tokenizer_of([each for own in references for each in own])


class _Words:
    """Splits texts into the words that BLEU counts, given the references."""

    def __init__(self, references: References) -> None:
        self._tokenize = BLEU(tokenize=_tokenizer(references)).tokenizer

    def __call__(self, text: str) -> list[str]:
        return str(self._tokenize(text.strip())).split()


class _RougeWords:
    """rouge-score's own words and stems; of a text with letters beyond a to z all words, those of a to z as stems."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._stems = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        if all(letter.isascii() or not letter.isalpha() for letter in text):
            return list(self._stems.tokenize(text))
        words = (part for word in split_words(text) for part in word.replace("’", "'").split("'"))
        return [stem for word in words for stem in (self._stems.tokenize(word) if word.isascii() else [word])]
