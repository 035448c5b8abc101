"""Which training examples the base model itself finds likeliest, and remembering them for the whole of a run.

People write less likely words than a model does, and a prefix that learns from all of them learns that too: its texts
surprise the base model as people's do. Choosing training texts by their perplexity under a model is an old habit of
pretraining (CCNet, Wenzek et al., 2020; "When less is more", Marion et al., 2023).
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from prefixkit import processes
from prefixkit.data import Example, PreparedData, keep_examples
from prefixkit.errors import ArtefactError
from prefixkit.evaluation import heldout_loss
from prefixkit.files import write_json
from prefixkit.lab.run.folder import LIKELIEST, TRAINING, read_record
from prefixkit.logs import get_logger
from prefixkit.models import Base
from prefixkit.models.fingerprint import fingerprint
from prefixkit.models.sharding import is_sharded

log = get_logger(__name__)

Progress = Callable[[int, int], None]


def likeliest(
    base: Base, examples: Sequence[Example], share: float, on_progress: Progress | None = None
) -> tuple[int, ...]:
    """Return the places of the likeliest examples, in rising order.

    Args:
        base: the base model, with nothing attached.
        examples: to choose from; by nats per learned token, so that short and long texts stand side by side.
        share: of them to keep, in (0, 1]; at least one is kept.
        on_progress: called with the examples done and the examples in all.

    Raises:
        EvaluationError: an example has no finite loss.
    """
    losses = heldout_loss(base, examples, on_progress=on_progress)
    means = [nats / max(tokens, 1) for nats, tokens in zip(losses.nats, losses.tokens, strict=True)]
    order = sorted(range(len(examples)), key=means.__getitem__)
    return tuple(sorted(order[: max(1, round(share * len(examples)))]))


def keep_likeliest(folder: Path, base: Base, data: PreparedData, share: float, report: Progress) -> PreparedData:
    """Return the data with its likeliest training examples alone: chosen once per run, by the first process.

    What was chosen stays in the run folder, so that a run that is resumed trains on the same examples whatever else
    the machine does: two sums of the same numbers need not agree in the last digit, and two examples may be that close.
    Where that was deleted with the rest of ``training/``, the base model is asked again.

    Args:
        folder: the run folder; only this process or those of the same run write there.
        base: the base model, with nothing attached.
        data: everything the run reads.
        share: `data.likeliest` of the recipe.
        report: called with the examples done and the examples in all.

    Raises:
        ArtefactError: what was chosen before is damaged.
    """
    if share == 1:
        return data
    path = folder / TRAINING / LIKELIEST
    made_from = {"data_hash": data.hash, "base": fingerprint(base.model)}
    known = processes.from_first(read_record(path))
    if any(known.get(key) != value for key, value in made_from.items()):
        if processes.is_first() or is_sharded(base.model):
            started = time.perf_counter()
            places = likeliest(base, data.train, share, report)
            taken = round(time.perf_counter() - started, 3)
            known = made_from | {"examples": len(data.train), "kept": list(places), "seconds": taken}
        if processes.is_first():
            write_json(path, known)
        known = processes.from_first(known)
    kept = known.get("kept")
    if not _is_choice(kept, len(data.train)):
        raise ArtefactError(f"{path}: damaged; delete it, and the base model is asked again")
    chosen = keep_examples(data, kept)
    log.info(
        "%d training examples left out that the base model finds less likely (data.likeliest); %d stay",
        chosen.counts.unlikely,
        chosen.counts.train,
    )
    return chosen


def _is_choice(kept: object, examples: int) -> bool:
    """Whether something read from a file is a choice among so many examples: some of their places, in rising order."""
    if not isinstance(kept, list) or not kept or any(type(place) is not int for place in kept):
        return False
    return kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < examples
