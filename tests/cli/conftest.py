"""The command line in a process of its own."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from processes import prefixkit


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., "CompletedProcess[str]"]:
    """Run prefixkit in an empty folder."""
    return partial(prefixkit, cwd=tmp_path)
