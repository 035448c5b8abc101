"""Processes of their own for tests, forked from one in which everything is imported already: an import takes seconds.

What such a process does, its exit code, and how it dies of a signal are the operating system's; what it prints is
caught in files. `python -m prefixkit` itself is started where that is what is tested.
"""

import multiprocessing
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from types import MappingProxyType
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "prefixkit.cli.main",
        "prefixkit.lab.run.run",
        "prefixkit.lab.run.report",
        "training.kill_me",
        "lab.run.hold",
        "frozen",
    ]
)


def prefixkit(*arguments: str, cwd: Path | None = None, given: bytes = b"") -> "CompletedProcess[str]":
    """Run a command of prefixkit's.

    Args:
        arguments: of the command line.
        cwd: the folder to run it in; the present one if left out.
        given: what it reads on stdin.
    """
    return run(prefixkit_main, *arguments, cwd=cwd, given=given)


def prefixkit_main() -> None:
    """Be the command line; with a step in PREFIXKIT_TEST_DIES_AT, die by SIGKILL once it is in metrics.jsonl."""
    from prefixkit.cli.main import main
    from prefixkit.training.callbacks import Metrics

    if (step := os.environ.get("PREFIXKIT_TEST_DIES_AT")) is not None:
        append = Metrics._append

        def dying(self: Metrics, line: dict[str, Any]) -> None:
            append(self, line)
            if line["step"] == int(step):
                os.kill(os.getpid(), signal.SIGKILL)

        Metrics._append = dying  # type: ignore[method-assign]
    main()


def run(
    main: Callable[[], object],
    *arguments: str,
    cwd: Path | None = None,
    given: bytes = b"",
    environ: Mapping[str, str] = MappingProxyType({}),
    seconds: float = 120,
) -> "CompletedProcess[str]":
    """Run a function without arguments as a program.

    Args:
        main: of a module that can be imported.
        arguments: what stands behind the program's name in `sys.argv`.
        cwd: the folder to run it in; the present one if left out.
        given: what it reads on stdin.
        environ: what its environment has beside the present one.
        seconds: how long it may take.
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("in", "out", "err")]
        streams[0].write_bytes(given)
        process = _context.Process(
            target=_enter, args=(main, arguments, cwd or Path.cwd(), streams, os.environ | environ)
        )
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{shlex.join(arguments)}: not over after {seconds} s")
        out, err = (stream.read_text(encoding="utf-8") if stream.exists() else "" for stream in streams[1:])
        return CompletedProcess(list(arguments), process.exitcode, out, err)


def _enter(
    main: Callable[[], object], arguments: tuple[str, ...], cwd: Path, streams: list[Path], environ: Mapping[str, str]
) -> None:
    """Become the program: its folder, environment, arguments and standard streams."""
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    sys.argv = ["prefixkit", *arguments]
    for number, stream in enumerate(streams):
        opened = os.open(stream, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)  # multiprocessing has given it /dev/null
    main()
