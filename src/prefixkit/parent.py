"""A process that was begun for another one's sake ends when that one is gone, even where it was killed suddenly."""

import os
import signal
import threading
import time
from collections.abc import Mapping

_PARENT = "PREFIXKIT_PARENT"
_EVERY_SECONDS = 1.0


def bound_to_me(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process that is to end with this one; it must call `end_with_parent`."""
    return {**environ, _PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Send this process SIGTERM as soon as the one that it is bound to is gone; bound to none, do nothing."""
    parent = os.environ.pop(_PARENT, None)  # its own children are not bound to it
    if parent is not None:
        threading.Thread(target=_watch, args=(int(parent),), name="parent", daemon=True).start()


def _watch(parent: int) -> None:
    import psutil  # here alone: the command line begins without it

    try:
        process = psutil.Process(parent)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_EVERY_SECONDS)
    except psutil.NoSuchProcess:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
