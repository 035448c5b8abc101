"""Evaluation: what a prefix does, in numbers with intervals, beside the systems it must beat."""

from prefixkit.evaluation.copying import Copying, Span, TrainingTexts
from prefixkit.evaluation.diversity import Distinct, SelfBleu
from prefixkit.evaluation.fluency import fluency_losses
from prefixkit.evaluation.intervals import (
    Interval,
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
from prefixkit.evaluation.labels import evaluate_labels, label_losses
from prefixkit.evaluation.loss import TokenLosses, heldout_loss
from prefixkit.evaluation.overlap import check_metrics
from prefixkit.evaluation.picking import validation_rows
from prefixkit.evaluation.protocol import check_context, evaluate
from prefixkit.evaluation.repetition import repetition
from prefixkit.evaluation.scores import Evaluation, Prediction, Sample, Score
from prefixkit.evaluation.systems import System, SystemName

__all__ = [
    "Copying",
    "Distinct",
    "Evaluation",
    "Interval",
    "Prediction",
    "Ratio",
    "Sample",
    "Score",
    "SelfBleu",
    "SentimentJudge",
    "Span",
    "Sums",
    "System",
    "SystemName",
    "TokenLosses",
    "TrainingTexts",
    "check_context",
    "check_metrics",
    "difference_interval",
    "evaluate",
    "evaluate_labels",
    "fluency_losses",
    "heldout_loss",
    "jackknife_influence",
    "jackknife_interval",
    "label_losses",
    "left_out_values",
    "ratio_interval",
    "repetition",
    "share_interval",
    "sums_interval",
    "validation_rows",
]
