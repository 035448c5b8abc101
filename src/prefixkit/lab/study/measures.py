"""What a study can compare: the scores of a run, and what its training cost."""

from functools import cache

from prefixkit.lab.pages.comparison import MEASURES, Better, Measure, Unit

DIVERGED, UNLEARNED = "diverged", "unlearned"
#: What a run did or did not do: arms have shares of their runs.
COUNTED = (DIVERGED, UNLEARNED)

#: Of a run's record.
COSTS = (
    Measure("seconds", "Training time", "Seconds of training, held-out losses included.", Better.LOWER, Unit.SECONDS),
    Measure("seconds_per_step", "Time per step", "The same divided by the steps.", Better.LOWER, Unit.SECONDS),
    Measure("peak_memory_bytes", "Peak memory", "Most memory of the process.", Better.LOWER, Unit.BYTES),
    Measure("flops_per_token", "Operations per token", "That what was trained adds to the base model's, for a token of "
            "text.", Better.LOWER, Unit.COUNT),
    Measure("materialised_bytes", "Size", "Bytes of what is kept after training.", Better.LOWER, Unit.BYTES),
    Measure("rollbacks", "Rollbacks", "How often training went off the rails and back.", Better.LOWER, Unit.COUNT),
    Measure(DIVERGED, "Diverged", "Share of runs whose loss or gradient left the rails for good.",
            Better.LOWER, Unit.SHARE),
    Measure(UNLEARNED, "Learned nothing", "Share of runs that are where they began: no loss on validation rows was "
            "below the start's.", Better.LOWER, Unit.SHARE),
    Measure("validation_loss", "Validation loss", "The lowest held-out loss on validation rows while training.",
            Better.LOWER, Unit.NATS),
)  # fmt: skip


#: Scores that say something beside another trained arm's alone. A report has only untrained systems beside the prefix
#: and leaves them out: a prefix that helps both halves of a text, the first one more, would look worse there.
BETWEEN_ARMS = (
    Measure("late_gap", "Second halves less first", "Held-out loss of the second half of each text less that of the "
            "first: what an arm gains in the beginning alone makes it rise.", Better.LOWER, Unit.NATS),
)  # fmt: skip


@cache
def known_measures() -> dict[str, Measure]:
    """Return every measure a study may name, by key."""
    return {measure.key: measure for measure in (*MEASURES, *BETWEEN_ARMS, *COSTS)}
