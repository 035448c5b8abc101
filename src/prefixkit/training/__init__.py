"""Training a prefix on transformers' Trainer, resumable to the bit."""

from prefixkit.training.callbacks import Measure, ProgressBar, read_metrics
from prefixkit.training.checkpoint import checkpoint_folder, checkpoints
from prefixkit.training.model import Trained
from prefixkit.training.run import Outcome, check_trackers, train_prefix
from prefixkit.training.start import build_encoder, prefix_lengths, text_position

__all__ = [
    "Measure",
    "Outcome",
    "ProgressBar",
    "Trained",
    "build_encoder",
    "check_trackers",
    "checkpoint_folder",
    "checkpoints",
    "prefix_lengths",
    "read_metrics",
    "text_position",
    "train_prefix",
]
