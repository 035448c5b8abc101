"""The processes of one run: `torchrun` or `accelerate launch` starts several, and each takes its share of every batch.

All of them load the base model and the data and hold the same prefix; the first one alone writes files. A program
started by itself is the first of one, and nothing here does anything.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from prefixkit.errors import TrainingError

_LONGEST_WAIT = timedelta(days=1)
"""The others wait while the first measures a finished run."""


def count() -> int:
    """Return how many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count_here() -> int:
    """Return how many of them are on this machine, and share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if count() > 1 else 1


def rank() -> int:
    """Return which one this is, counted from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the one that writes files and speaks."""
    return rank() == 0


def join() -> None:
    """Find the other processes; calling it again does nothing.

    Raises:
        TrainingError: they are not there, or went away meanwhile.
    """
    if count() > 1:
        import torch
        from accelerate import PartialState

        on_cpu = {} if torch.cuda.is_available() else {"cpu": True, "backend": "gloo"}
        try:
            PartialState(timeout=_LONGEST_WAIT, **on_cpu)
        except torch.distributed.DistError:
            raise TrainingError(
                f"process {rank()} of {count()} did not find the others; see what the first one says"
            ) from None


def wait() -> None:
    """Wait until all processes are here."""
    if count() > 1:
        import torch

        torch.distributed.barrier()


def from_first(value: Any) -> Any:
    """Return the first process's value in all of them; it is pickled on the way."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def totals(*numbers: float | int) -> Sequence[float | int]:
    """Return the sums of each number over all processes."""
    if count() == 1:
        return numbers
    import torch
    from accelerate import PartialState
    from accelerate.utils import reduce

    device = PartialState().device
    exact = torch.float32 if device.type == "mps" else torch.float64
    return reduce(torch.tensor(numbers, dtype=exact, device=device), "sum").tolist()  # type: ignore[no-any-return]
