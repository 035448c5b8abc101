"""Trials on Ray: on this machine's Ray, or on a cluster whose machines share the sweep's folder."""

import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from prefixkit.errors import ConfigError
from prefixkit.lab.sweep.plan import Trial
from prefixkit.lab.sweep.trial import Result, Runner, run_here

_PATIENCE = 10.0
"""Seconds to wait for a cluster's head."""
_TO_SAVE = 120.0
"""Seconds that trials have, once interrupted, to take their step and save a checkpoint."""
_RETRIES = 3
"""Times a trial begins again elsewhere, from its last checkpoint, when its worker or machine is lost."""


def on_ray(address: str | None = None, *, cores: int = 1, gpus: float | int = 0) -> Runner:
    """Return what hands trials to Ray.

    Args:
        address: of a cluster, such as ``auto`` or ``ray://head:10001``; left out, Ray is started on this machine.
        cores: that each trial takes.
        gpus: likewise; a share of one is possible.

    Raises:
        ConfigError: Ray is not installed, or cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError('--on ray: Ray is not installed; pip install "prefixkit[ray]"') from None
    if cores < 1:
        raise ConfigError(f"--cores: expected at least 1, got {cores}")
    if not ray.is_initialized():
        _check_reachable(address)
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise ConfigError(f"--address: cannot reach Ray at {address}: {' '.join(str(error).split())}") from None
    return partial(_run, ray, cores, gpus)


def _check_reachable(address: str | None) -> None:
    """Knock at a head's door first: Ray itself would knock for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").partition(":")
    if not colon or not port.isdigit():
        return  # started here, or found by Ray (``auto``)
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
    except OSError as error:
        reason = error.strerror or "nobody answers"
        raise ConfigError(f"--address: cannot reach Ray at {address}: {reason}; is its head running?") from None


def _run(ray: Any, cores: int, gpus: float | int, trials: Sequence[Trial], done: Callable[[Result], None]) -> None:
    # A worker ends with its trial: none meets what another left behind. Ray tells it its share of the cores.
    remote = ray.remote(num_cpus=cores, num_gpus=gpus, max_retries=_RETRIES, max_calls=1)(run_here)
    under_way = {remote.remote(trial): trial for trial in trials}
    try:
        while under_way:
            (first,), _ = ray.wait(list(under_way), num_returns=1)
            trial = under_way.pop(first)
            try:
                done(ray.get(first))
            except ray.exceptions.RayError as error:  # it raised, or its worker was lost too often
                cause = getattr(error, "cause", None) or error
                done(Result(trial, {}, f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"))
    except BaseException:
        _end(ray, list(under_way))
        raise


def _end(ray: Any, tasks: Sequence[Any]) -> None:
    """Do what Ctrl-C does where trials run: they save a checkpoint each, and end; those that wait do not begin."""
    for task in tasks:
        ray.cancel(task)
    if tasks:
        ray.wait(list(tasks), num_returns=len(tasks), timeout=_TO_SAVE)
