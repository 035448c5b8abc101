"""Trials on this machine, one after the other or several at a time."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from functools import partial

from prefixkit.errors import ConfigError
from prefixkit.lab.sweep.plan import Trial
from prefixkit.lab.sweep.processes import Processes
from prefixkit.lab.sweep.trial import Result, Runner, run_apart
from prefixkit.models.hardware import choose_threads


def on_this_machine(workers: int = 1) -> Runner:
    """Return what runs so many trials at a time; they share the cores.

    Raises:
        ConfigError: fewer than one.
    """
    if workers < 1:
        raise ConfigError(f"--workers: expected at least 1, got {workers}")
    return partial(_run, workers)


def _run(workers: int, trials: Sequence[Trial], done: Callable[[Result], None]) -> None:
    threads = None if workers == 1 else max(1, choose_threads() // workers)
    processes = Processes()
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run_apart, trial, processes, threads) for trial in trials]
        try:
            for future in as_completed(futures):
                done(future.result())
        except BaseException:
            for future in futures:
                future.cancel()
            processes.interrupt()
            _wait(futures, processes)
            raise


def _wait(futures: Sequence[Future[Result]], processes: Processes) -> None:
    """Wait for interrupted trials to save what they have; another Ctrl-C tells them to stop at once."""
    try:
        wait(futures)
    except KeyboardInterrupt:
        processes.interrupt()
