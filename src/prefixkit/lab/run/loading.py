"""What a recipe reads: its base model and its data."""

from collections.abc import Sequence
from itertools import pairwise

from prefixkit import processes
from prefixkit.config import Format, Method, Recipe
from prefixkit.data import NO_LOSS, Example, PreparedData, prepare
from prefixkit.errors import DataError
from prefixkit.evaluation import check_context, check_metrics
from prefixkit.models import Base, load_base_model
from prefixkit.models.inspect import inspect_model
from prefixkit.training import text_position


def load_for(recipe: Recipe) -> tuple[Base, PreparedData]:
    """Load a recipe's base model and data, and check that the one can read the other.

    Training examples are all that `data.likeliest` chooses from.

    Raises:
        PrefixkitError: the base model or the data cannot be loaded, or do not go together.
    """
    check_metrics(recipe)
    base = load_base_model(
        recipe.model.base,
        revision=recipe.model.revision,
        dtype=recipe.model.dtype,
        attention=recipe.model.attention,
        on_cpu=recipe.model.shard and processes.count() > 1,
    )
    base.check_format(recipe.data.format)
    positions = text_position(inspect_model(base.model).geometry, recipe)
    data = prepare(
        recipe.data,
        base.tokenizer,
        prefix_tokens=positions,
        context_tokens=base.context_tokens,
        start=base.start_token_id,
        reads_both_ways=base.reads_both_ways,
    )
    if recipe.method.kind is Method.INFIX and recipe.data.format is Format.MESSAGES:
        check_single_replies((*data.train, *data.validation, *data.test, *data.contrast))
    if not data.classes:
        check_context(base, data, recipe, prefix_tokens=positions)
    return base, data


def check_single_replies(examples: Sequence[Example]) -> None:
    """Refuse conversations in which an infix would be learned before another reply than it is used before.

    Raises:
        DataError: several replies are learned of one.
    """
    for example in examples:
        learns = [token != NO_LOSS for token in example.labels]
        if sum(now and not before for before, now in pairwise([False, *learns])) > 1:
            raise DataError(
                "method=infix stands before one reply, and several are learned of the conversation that ends "
                f"{example.prompt[-60:]!r}; give conversations of one reply each, or use method=prefix"
            )
