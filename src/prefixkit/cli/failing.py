"""How the command line fails: one line on stderr and exit 1; Ctrl-C and SIGTERM exit 130."""

import math
import signal
import sys
import time
import traceback
from types import FrameType

import typer

from prefixkit.errors import PrefixkitError

_UNUSABLE = 2
_INTERRUPTED = 130
_SAME_SECONDS = 5.0


def take_termination_as_interrupt() -> None:
    """Let SIGTERM, sent before a scheduler kills, and SIGHUP, of a terminal that closes, do what Ctrl-C does.

    Some send it twice: a second one within seconds is the same one.
    """
    last = -math.inf

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if time.monotonic() - last < _SAME_SECONDS:
            return
        last = time.monotonic()
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's `&` has it, which means the keyboard
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.raise_signal(signal.SIGINT)

    there = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # not all on Windows
    for each in there:
        if signal.getsignal(each) is signal.SIG_DFL:  # `nohup` ignores SIGHUP, and means it
            signal.signal(each, interrupt)


def run_app(app: typer.Typer, arguments: list[str]) -> int:
    """Run the app and return its exit status.

    Args:
        app: the command line.
        arguments: as typed, without the program's name.
    """
    is_debug = "--debug" in arguments
    try:
        status = app(arguments, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _say(_interrupted(arguments), _INTERRUPTED)
    except BrokenPipeError:
        return 0
    except typer.TyperException as error:
        message = " ".join(error.format_message().split())  # empty where the help was shown instead
        return _say(f"error: {message}; see --help", _UNUSABLE) if message else _UNUSABLE
    except (PrefixkitError, OSError) as error:
        if is_debug:
            traceback.print_exc()
        return _say(f"error: {_one_line(error)}", 1)
    if status == _INTERRUPTED:  # typer turns Ctrl-C into a status of its own
        return _say(_interrupted(arguments), _INTERRUPTED)
    return status if isinstance(status, int) else 0


def _interrupted(arguments: list[str]) -> str:
    return "interrupted; go on with --resume" if "train" in arguments else "interrupted"


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'file'}: {error.strerror}"
    return " ".join(str(error).split())


def _say(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status
