"""What a system says about labelled texts, and what those texts' labels are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from seqeval.metrics import f1_score as entity_f1_score
from sklearn.metrics import f1_score

from prefixkit.evaluation.intervals import Ratio

_OUTSIDE = "O"


@dataclass(frozen=True)
class Answers:
    """Probabilities for every place that has a label.

    Attributes:
        names: the classes, in the order of the columns.
        logs: log probabilities of each text's places, `[k, c]`.
        expected: the number of the true class at each of those, `[k]`.
    """

    names: tuple[str, ...]
    logs: tuple[NDArray[np.float64], ...]
    expected: tuple[NDArray[np.int64], ...]

    @property
    def predicted(self) -> list[NDArray[np.int64]]:
        """The number of the likeliest class at each place."""
        return [self.predicted_at(row) for row in range(len(self.logs))]

    @property
    def losses(self) -> Ratio:
        """Nats per label: each text's sum, over its number of places."""
        nats = (-each[np.arange(len(true)), true].sum() for each, true in zip(self.logs, self.expected, strict=True))
        return Ratio(tuple(map(float, nats)), self._places)

    @property
    def hits(self) -> Ratio:
        """Share of places whose label is found, text by text."""
        right = ((own == true).sum() for own, true in zip(self.predicted, self.expected, strict=True))
        return Ratio(tuple(map(float, right)), self._places)

    @property
    def has_entities(self) -> bool:
        """Whether the labels mark entities as CoNLL-2003 does: ``B-`` and ``I-`` and a kind, ``O`` outside."""
        inside = [name for name in self.names if name != _OUTSIDE]
        return bool(inside) and all(name[:2] in ("B-", "I-") and len(name) > 2 for name in inside)

    def macro_f1(self, rows: Sequence[int]) -> float:
        """Return the mean of F1 over the classes that are true or predicted of the texts, each counting the same."""
        true = np.concatenate([self.expected[row] for row in rows])
        own = np.concatenate([self.predicted_at(row) for row in rows])
        return float(f1_score(true, own, average="macro", zero_division=0))

    def entity_f1(self, rows: Sequence[int]) -> float:
        """Return F1 of whole entities, as the CoNLL shared tasks count them; of the given texts."""
        true = [[self.names[each] for each in self.expected[row]] for row in rows]
        own = [[self.names[each] for each in self.predicted_at(row)] for row in rows]
        return float(entity_f1_score(true, own, zero_division=0))

    def predicted_at(self, row: int) -> NDArray[np.int64]:
        """Return the number of the likeliest class at each place of one text."""
        return np.asarray(self.logs[row].argmax(axis=1))

    @property
    def _places(self) -> tuple[float, ...]:
        return tuple(float(len(each)) for each in self.expected)
