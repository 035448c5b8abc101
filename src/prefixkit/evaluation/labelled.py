"""Labelled texts as evaluation sees them: where their labels are, and what a model's last layer says there."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prefixkit.classification import hidden_at
from prefixkit.config import Pooling
from prefixkit.data import NO_LOSS, Example
from prefixkit.evaluation.progress import OnTexts
from prefixkit.models import Base
from prefixkit.prefix import Prefix


def places_of(example: Example) -> list[int]:
    """Return the tokens of a text that have a label."""
    return [place for place, label in enumerate(example.labels) if label != NO_LOSS]


def expected_of(example: Example) -> NDArray[np.int64]:
    """Return the numbers of its labels' classes, `[k]`."""
    return np.array([label for label in example.labels if label != NO_LOSS])


def states_of(
    base: Base, examples: Sequence[Example], prefix: Prefix | None, pooling: Pooling, told: OnTexts | None
) -> list[Tensor]:
    """Return the last hidden states a head reads, `[k, e]` per text.

    Args:
        base: the frozen model, with nothing attached.
        examples: texts with labels.
        prefix: what the model reads; None for nothing.
        pooling: whether the head reads the mean of a text's states, or those where a label is.
        told: about progress.
    """
    ids = [example.input_ids for example in examples]
    places = [None if pooling is Pooling.MEAN else places_of(example) for example in examples]
    return hidden_at(base, ids, places, prefix=prefix, on_progress=told)
