"""Watching a run: loss and gradient norm are looked at before every optimiser step."""

import math
from collections import deque
from statistics import median

from prefixkit.errors import DivergedError

#: Steps the running median looks back over, and how many it needs to say anything.
_WINDOW, _ENOUGH = 25, 5


class Monitor:
    """Raises before a step that would carry a run off the rails.

    Args:
        loss_ratio: a loss above this many times the running median counts as exploded.
    """

    def __init__(self, loss_ratio: float) -> None:
        self._loss_ratio = loss_ratio
        self._recent: deque[float] = deque(maxlen=_WINDOW)

    def check(self, step: int, loss: float, grad_norm: float) -> None:
        """Look at one step.

        Args:
            step: the optimiser step about to be taken, from 1.
            loss: its training loss, nats per token.
            grad_norm: norm of its gradient before clipping.

        Raises:
            DivergedError: loss or gradient norm is NaN or infinite, or the loss exploded.
        """
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                raise DivergedError(f"step {step}: {name} is {value}; lower train.learning_rate")
        if len(self._recent) >= _ENOUGH and loss > self._loss_ratio * median(self._recent):
            raise DivergedError(
                f"step {step}: loss {loss:.3g} is more than {self._loss_ratio:g} times the running median "
                f"{median(self._recent):.3g}; lower train.learning_rate"
            )
        self._recent.append(loss)

    def state(self) -> list[float]:
        """Return what a checkpoint must keep."""
        return list(self._recent)

    def restore(self, state: list[float]) -> None:
        """Go back to a checkpoint's state."""
        self._recent = deque(state, maxlen=_WINDOW)
