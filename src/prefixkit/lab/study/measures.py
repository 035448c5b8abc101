"""What a study can compare: the scores of a run, and what its training cost."""

from functools import cache

from prefixkit.lab.pages.comparison import MEASURES, Better, Measure, Unit

DIVERGED, UNLEARNED = "diverged", "unlearned"
#: What a run did or did not do: arms have shares of their runs.
COUNTED = (DIVERGED, UNLEARNED)

#: What tables show, as far as arms have it: what is learned, what is written, and what it costs.
SHOWN = (
    "heldout_nll", "accuracy", "bleu", "nist", "chrf", "meteor", "rouge_1", "rouge_2", "rouge_l", "sentiment_accuracy",
    "fluency_ppl", "distinct_2", "seconds_per_step", "seconds_per_token", "peak_memory_bytes", "trainable_parameters",
    "flops_per_token",
)  # fmt: skip
#: What is no matter of the texts a run is measured on.
_NOT_OF_TEXTS = ("seconds_per_token", "trainable_parameters")
#: Shares of texts that are this or that, one by one.
SHARES = ("accuracy", "sentiment_accuracy")
#: What depends on the processor and on what else it does.
OF_HARDWARE = ("seconds", "seconds_per_step", "seconds_per_token", "peak_memory_bytes")
#: What a better learning rate would not improve, or has no claim to be at its best.
WITHOUT_A_BEST = ("seconds", "seconds_per_step", "peak_memory_bytes", "flops_per_token", "materialised_bytes",
                  "rollbacks", DIVERGED, "seconds_per_token", "trainable_parameters")  # fmt: skip

#: Of a run's record.
COSTS = (
    Measure("seconds", "Training time", "Seconds of training, held-out losses included.", Better.LOWER, Unit.SECONDS),
    Measure("seconds_per_step", "Time per step", "Seconds of training over its steps.", Better.LOWER, Unit.SECONDS),
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


def is_of_texts(measure: str) -> bool:
    """Whether other test texts, or other texts written, would change a measure."""
    return measure not in (*_NOT_OF_TEXTS, *(cost.key for cost in COSTS))


@cache
def known_measures() -> dict[str, Measure]:
    """Return every measure a study may name, by key."""
    return {measure.key: measure for measure in (*MEASURES, *BETWEEN_ARMS, *COSTS)}
