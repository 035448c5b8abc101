"""Time per generated token of every system, in turns, so that what the machine does meanwhile meets all of them."""

from collections.abc import Sequence
from statistics import median

from prefixkit.evaluation.scores import Score
from prefixkit.evaluation.systems import System, SystemName
from prefixkit.generation import token_seconds
from prefixkit.models import Base

_ROUNDS = 3


def measure_latency(
    base: Base, systems: Sequence[System], prompt: str, *, tokens: int, source_tokens: int
) -> dict[SystemName, Score]:
    """Return the median seconds per generated token of each system.

    One text is written at a time, with the likeliest tokens, each system's behind its own prompt. A first round, which
    fills caches, is not counted. There is no interval: tokens of one run share what the machine did meanwhile, so they
    say little about the next; runs of a study do.

    Args:
        base: the frozen model, with nothing attached.
        systems: what is timed.
        prompt: what is continued.
        tokens: times of each system and round.
        source_tokens: most tokens an encoder reads of the prompt.

    Raises:
        DataError: a prompt and its tokens do not fit the context.
    """
    times: dict[SystemName, list[float]] = {system.name: [] for system in systems}
    for round_ in range(1 + _ROUNDS):
        for system in systems:
            (asked,) = system.prompts([prompt])
            read = system.source_tokens(base, source_tokens)
            found = token_seconds(base, asked, tokens=tokens, prefix=system.prefix, source_tokens=read)
            times[system.name] += found if round_ else []
    return {name: Score(median(found)) for name, found in times.items()}
