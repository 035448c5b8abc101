"""One of several processes of a run: trains the recipe in argv[1] into the folder argv[2]; see test_processes.py.

With a step in argv[3], the process whose rank is in argv[4] dies by SIGKILL when that step is reached.
"""

import os
import signal
import sys
from pathlib import Path

from prefixkit import processes
from prefixkit.config import load_recipe
from prefixkit.lab.run import train_run


def main() -> None:
    """Train one recipe."""
    dies_at, dying = (int(argument) for argument in sys.argv[3:]) if len(sys.argv) > 3 else (-1, -1)

    def report(what: str, done: int, total: int, words: str) -> None:
        pass

    from prefixkit.training.callbacks import Metrics

    log = Metrics.on_log

    def on_log(self: Metrics, args: object, state: object, *rest: object, **options: object) -> None:
        log(self, args, state, *rest, **options)  # type: ignore[arg-type]
        if state.global_step == dies_at and processes.rank() == dying:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGKILL)

    Metrics.on_log = on_log  # type: ignore[assignment,method-assign]
    train_run(load_recipe(sys.argv[1]), Path(sys.argv[2]), resume=True, report=report)
