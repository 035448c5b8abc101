"""What happens around optimiser steps: held-out loss and early stopping, metrics, progress, Ctrl-C."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefixkit import processes
from prefixkit.errors import DivergedError, NotFiniteError
from prefixkit.files import write_text
from prefixkit.logs import get_logger
from prefixkit.models.sharding import is_sharded
from prefixkit.training.checkpoint import Progress
from prefixkit.training.model import Part, PrefixModel, Trained

log = get_logger(__name__)

METRICS_NAME = "metrics.jsonl"

#: Measures a held-out loss, in nats per token or label, of the base model with what is trained.
Measure = Callable[[Trained], float]


#: Told about progress: step, steps in all, a few words.
ProgressBar = Callable[[int, int, str], None]


class HeldOut(TrainerCallback):
    """Measures the held-out loss, keeps the best encoder, and stops when patience runs out.

    Args:
        model: the model in training.
        measure: gives the held-out loss of what is trained.
        every: steps between measurements; the first is before step 1, the last after the last step.
        patience: measurements without a new best before stopping; None for never.
        progress: the run's memory, shared with the checkpoints.
    """

    def __init__(
        self, model: PrefixModel, measure: Measure, *, every: int, patience: int | None, progress: Progress
    ) -> None:
        self._model, self._measure, self._every, self._patience = model, measure, every, patience
        self.progress = progress
        self.best: dict[str, Tensor] | None = None
        self.latest: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure where the run starts, unless it resumes."""
        if state.global_step == 0:
            self._look(0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure when it is time; ask to stop when nothing better came for too long."""
        self.latest = None
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._look(state.global_step)
            if self._patience is not None and self.progress.waited >= self._patience:
                log.info("stopping early: no better held-out loss since step %d", self.progress.best_step)
                control.should_training_stop = True

    def _look(self, step: int) -> None:
        measures = processes.is_first() or is_sharded(self._model)  # whose parts are with all of them
        try:
            loss = self._measure(self._model.materialise()) if measures else None
        except NotFiniteError:
            if step == 0:  # nothing was trained yet: it says what is wrong with what was loaded
                raise
            loss = math.nan
        self.latest = processes.from_first(loss)
        assert self.latest is not None
        if not math.isfinite(self.latest):
            raise DivergedError(
                f"step {step}: held-out loss is {self.latest}; lower train.learning_rate (or method.learning_rate)"
            )
        if self.progress.best_loss is None or self.latest < self.progress.best_loss:
            self.progress.best_loss, self.progress.best_step, self.progress.waited = self.latest, step, 0
            self.best = {name: t.detach().clone() for name, t in self._model.trained_state().items()}
        else:
            self.progress.waited += 1


class Metrics(TrainerCallback):
    """Appends one line per step to metrics.jsonl, and reports progress.

    Args:
        path: the file; on resume, lines past the checkpoint's step are cut off first.
        heldout: where the latest held-out loss is found.
        report: told about every step.

    Attributes:
        tokens: read so far.
        rates: of the step under way, by part; ``learning_rate`` is the first one's, ``method.learning_rate`` and
            ``head.learning_rate`` are those of further ones.
    """

    def __init__(self, path: Path, heldout: HeldOut, report: ProgressBar) -> None:
        self._path, self._heldout, self._report = path, heldout, report
        self.tokens = 0
        self.rates: dict[Part, float] = {}
        self.seconds = 0.0
        self._started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut the file back to the step the run starts from."""
        kept = [line for line in read_metrics(self._path) if line["step"] <= state.global_step and state.global_step]
        if processes.is_first():
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        if kept:
            self.tokens, self.seconds = kept[-1]["tokens"], kept[-1]["seconds"]
        else:
            self._append({"step": 0, "heldout_loss": self._heldout.latest, "tokens": 0, "seconds": 0.0})
        self._started = time.perf_counter() - self.seconds

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one step."""
        if not logs or "grad_norm" not in logs:
            return
        self.seconds = time.perf_counter() - self._started
        line = {
            "step": state.global_step,
            "loss": logs["loss"],
            "grad_norm": logs["grad_norm"],
            "learning_rate": logs["learning_rate"],
            **{f"{part}.learning_rate": rate for part, rate in list(self.rates.items())[1:]},
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
        }
        if self._heldout.latest is not None:
            line["heldout_loss"] = self._heldout.latest
        self._append(line)
        best = self._heldout.progress.best_loss
        message = f"loss {logs['loss']:.3f}, held-out {best:.3f}" if best is not None else f"loss {logs['loss']:.3f}"
        self._report(state.global_step, state.max_steps, message)

    def _append(self, line: dict[str, Any]) -> None:
        if not processes.is_first():
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file, without a last one that a killed run left half written."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class StopAfterStep(TrainerCallback):
    """Turns Ctrl-C into a checkpoint and an orderly end after the present step.

    Attributes:
        asked: this process was interrupted.
        is_due: one of all processes was, before they took the present step.
    """

    def __init__(self) -> None:
        self.asked = False
        self.is_due = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop, if asked to."""
        if self.is_due:
            control.should_save = True
            control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the interrupt signal while training; a second Ctrl-C stops at once. Main thread only."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            log.info("interrupted: saving a checkpoint after this step (Ctrl-C again to stop at once)")

        try:
            before = signal.signal(signal.SIGINT, ask)
        except ValueError:  # not the main thread: there are no signals to take
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
