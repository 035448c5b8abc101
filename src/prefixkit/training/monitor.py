"""Watching a run: loss and gradient norm are looked at before every optimiser step."""

import math
from collections import deque
from statistics import median

from prefixkit.errors import DivergedError

#: Steps the running median looks back over, and how many it needs to say anything.
_WINDOW, _ENOUGH = 25, 5
#: Steps in a row a loss must be high: a batch of few learned tokens may be three times as hard as others, once.
_LASTING = 3
#: Nats a loss must lie above the median to have exploded: a loss near 0 may well triple in one batch.
_MARGIN = 2.0


class Monitor:
    """Raises before a step that would carry a run off the rails.

    Args:
        loss_ratio: a loss above this many times the running median, and 2 nats above it, three steps in a row counts as
            exploded.
        norm_ratio: likewise for the gradient norm, where it is also above `max_grad_norm`.
        max_grad_norm: gradients are scaled down to this norm, so that smaller ones do no harm.
    """

    def __init__(self, loss_ratio: float, norm_ratio: float, max_grad_norm: float) -> None:
        self._loss_ratio, self._norm_ratio, self._max_grad_norm = loss_ratio, norm_ratio, max_grad_norm
        self._losses: deque[float] = deque(maxlen=_WINDOW + _LASTING - 1)
        self._norms: deque[float] = deque(maxlen=_WINDOW)

    def check(self, step: int, loss: float, grad_norm: float) -> None:
        """Look at one step.

        Args:
            step: the optimiser step about to be taken, from 1.
            loss: its training loss, nats per token.
            grad_norm: norm of its gradient before clipping.

        Raises:
            DivergedError: loss or gradient norm is NaN or infinite, or exploded.
        """
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                raise DivergedError(
                    f"step {step}: {name} is {value}; lower train.learning_rate (or method.learning_rate)"
                )
        losses = [*self._losses, loss]
        before, latest = losses[:-_LASTING], losses[-_LASTING:]
        if len(before) >= _ENOUGH:
            middle = median(before)
            if min(latest) > max(self._loss_ratio * middle, middle + _MARGIN):
                raise DivergedError(_exploded(step, f"loss {loss:.3g}, the third in a row,", self._loss_ratio, middle))
        if len(self._norms) >= _ENOUGH:
            middle = median(self._norms)
            if grad_norm > max(self._norm_ratio * middle, self._max_grad_norm):
                raise DivergedError(_exploded(step, f"gradient norm {grad_norm:.3g}", self._norm_ratio, middle))
        self._losses.append(loss)
        self._norms.append(grad_norm)

    def state(self) -> tuple[list[float], list[float]]:
        """Return what a checkpoint must keep: recent losses and gradient norms."""
        return list(self._losses), list(self._norms)

    def restore(self, losses: list[float], norms: list[float]) -> None:
        """Go back to a checkpoint's state."""
        self._losses, self._norms = deque(losses, self._losses.maxlen), deque(norms, self._norms.maxlen)


def _exploded(step: int, what: str, ratio: float, middle: float) -> str:
    return (
        f"step {step}: {what} is more than {ratio:g} times the running median {middle:.3g}; "
        "lower train.learning_rate (or method.learning_rate)"
    )
