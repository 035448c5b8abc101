"""A process bound to another ends when that one is killed."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

CHILD = """
import time
from prefixkit.parent import end_with_parent

end_with_parent()
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
from prefixkit.parent import bound_to_me

environ = bound_to_me(os.environ) if sys.argv[2] == "bound" else os.environ
print(subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environ).pid, flush=True)
time.sleep(60)
"""


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("is_bound", [True, False])
def test_it_ends_with_the_one_it_is_bound_to(is_bound: bool) -> None:
    how = "bound" if is_bound else "free"
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD, how], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(1.0)
        assert is_alive(child)
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + (30.0 if is_bound else 2.5)
        while is_alive(child) and time.monotonic() < deadline:
            time.sleep(0.1)
        ended = not is_alive(child)
        if not ended:
            os.kill(child, signal.SIGKILL)
    assert ended is is_bound
