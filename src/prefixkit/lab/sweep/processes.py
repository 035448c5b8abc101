"""The processes of trials that are running, to be interrupted together."""

import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import IO


class Processes:
    """Runs commands, from several threads, each in a session of its own, so that only `interrupt` interrupts it.

    A terminal's Ctrl-C reaches every process of its session, a scheduler's signal often this one only; either way each
    command is to be interrupted once: a second time makes a run stop without a checkpoint.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._is_ending = False

    @property
    def is_ending(self) -> bool:
        """Whether they were interrupted."""
        return self._is_ending

    def run(self, command: Sequence[str], environ: Mapping[str, str], stderr: IO[str]) -> int:
        """Run a command to its end, without its output.

        Args:
            command: the program and its arguments.
            environ: its environment variables.
            stderr: file for what it says.

        Returns:
            Its exit status; minus the signal's number where one killed it.

        Raises:
            KeyboardInterrupt: everything was interrupted before it began.
        """
        with self._lock:
            if self._is_ending:
                raise KeyboardInterrupt
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=stderr, env=environ, start_new_session=True
            )
            self._running.add(process)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._running.discard(process)

    def interrupt(self) -> None:
        """Tell every running command to end, and begin no further one; the second time, to end at once.

        SIGTERM first: one that was started by a shell's `&` may ignore SIGINT.
        """
        with self._lock:
            number = signal.SIGINT if self._is_ending else signal.SIGTERM
            self._is_ending = True
            for process in self._running:
                process.send_signal(number)
