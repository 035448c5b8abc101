"""Which attention a run trains with: what its recipe says, or the fastest on this machine, remembered by the run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median_low
from typing import Any

from prefixkit import processes
from prefixkit.compat import attention_settings, restore_attention
from prefixkit.config import Attention, Recipe
from prefixkit.data import Example
from prefixkit.errors import ArtefactError
from prefixkit.files import write_json
from prefixkit.lab.run.folder import ATTENTION, TRAINING, read_record
from prefixkit.lab.run.memory import mixed_precision
from prefixkit.logs import get_logger
from prefixkit.models import Base
from prefixkit.models.attention_speed import attention_seconds
from prefixkit.models.inspect import IMPLEMENTATIONS

log = get_logger(__name__)

#: Eager attention keeps every score for the backward pass, so it must be faster by more than times vary.
_FASTER = 0.9


@contextmanager
def training_attention(folder: Path, base: Base, examples: Sequence[Example], recipe: Recipe) -> Iterator[None]:
    """Let a model train with the attention the recipe asks for, and have its own back afterwards.

    The fastest is timed once per run, by the first process, and kept in the run folder: implementations differ in the
    last digits, so a run that is resumed goes on with the same one, whatever else the machine does.

    Args:
        folder: the run folder.
        base: the base model, with nothing attached.
        examples: what is learned from.
        recipe: how.

    Raises:
        ArtefactError: what was chosen before is damaged.
    """
    if recipe.model.attention is not Attention.FASTEST:
        yield
        return
    settings = attention_settings(base.model)
    known = processes.from_first(_timed(folder, base, examples, recipe) if processes.is_first() else {})
    if known.get("chosen") not in IMPLEMENTATIONS:
        raise ArtefactError(f"{folder / TRAINING / ATTENTION}: damaged; delete it, and attention is timed again")
    base.model.set_attn_implementation(known["chosen"])
    try:
        yield
    finally:
        restore_attention(settings)


def _timed(folder: Path, base: Base, examples: Sequence[Example], recipe: Recipe) -> dict[str, Any]:
    """Return what was chosen, from what times; those of the run folder, if it has any."""
    path = folder / TRAINING / ATTENTION
    if known := read_record(path):
        return known
    tokens = median_low(example.longest for example in examples)
    with mixed_precision(base, recipe.train):
        seconds = attention_seconds(
            base.model,
            rows=recipe.train.batch_size // processes.count(),
            tokens=tokens,
            virtual_tokens=_virtual_tokens(recipe),
        )
    chosen = choose(seconds)
    times = ", ".join(f"{name} {taken * 1000:.1f} ms" for name, taken in seconds.items())
    log.info("attention of a layer, forwards and backwards: %s; training with %s", times, chosen)
    known = {"chosen": chosen, "tokens": tokens, "seconds": seconds}
    write_json(path, known)
    return known


def _virtual_tokens(recipe: Recipe) -> int:
    """Return how many a layer has at most; a soft prompt's are keys and values too."""
    prefix, method = recipe.prefix, recipe.method
    if not method.has_prefix and not method.kind.is_prompt:
        return 0
    return max(prefix.layer_lengths or [prefix.num_virtual_tokens])


def choose(seconds: dict[str, float]) -> str:
    """Return the implementation to train with, by the seconds of each: sdpa unless another is clearly faster."""
    fastest = min(seconds, key=seconds.__getitem__)
    if "sdpa" in seconds and seconds[fastest] > _FASTER * seconds["sdpa"]:
        return "sdpa"
    return fastest
