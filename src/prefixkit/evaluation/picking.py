"""Which held-out rows are measured."""

from collections.abc import Sequence

from prefixkit.config import Recipe
from prefixkit.data import Example, PreparedData, content_hash


def pick(examples: Sequence[Example], rows: int) -> list[Example]:
    """Return the first rows in the order of their content's hash."""
    return sorted(examples, key=lambda example: content_hash(f"{example.prompt}\n{example.text}"))[:rows]


def hash_of_texts(examples: Sequence[Example], prompts: Sequence[str] = ()) -> str:
    """Return a hash of what is measured on, in its order: texts that are read, and prompts that are gone on from."""
    read = (content_hash(f"{example.prompt}\n{example.text}").hex() for example in examples)
    return content_hash("\n".join([*read, *prompts])).hex()


def validation_rows(data: PreparedData, recipe: Recipe) -> list[Example]:
    """Return the rows early stopping looks at: as `pick` does, for a file may be sorted by label, topic or date."""
    return pick(data.validation, recipe.train.validation_rows)
