"""What the systems are asked to continue, and what people wrote there.

Free texts are many and different behind one prompt, so prompts come in turn until there are as many texts as a recipe
wants. An input to answer is another matter: each is answered once, and all that people answered belongs together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from prefixkit.config import Format, Recipe
from prefixkit.data import Example, content_hash
from prefixkit.evaluation.picking import pick


@dataclass(frozen=True)
class Asked:
    """What every system writes for.

    Attributes:
        prompts: what is continued, one per sample.
        people: held-out examples whose texts the systems' are to be read beside.
        references: of each prompt all that people wrote for it; empty where prompts are no inputs to answer.
    """

    prompts: tuple[str, ...]
    people: tuple[Example, ...]
    references: tuple[tuple[str, ...], ...] = ()


def answers_inputs(recipe: Recipe) -> bool:
    """Whether the systems answer held-out inputs, so that people's answers are there to compare with."""
    settings = recipe.evaluation
    has_inputs = recipe.data.format in (Format.INPUT_TARGET, Format.MESSAGES)
    return has_inputs and settings.prompts is None and settings.samples > 0


def asked_of(test: Sequence[Example], recipe: Recipe, *, ask: Callable[[str], str] = str) -> Asked:
    """Return what systems are asked to write.

    Args:
        test: all held-out rows of the kind that was learned.
        recipe: its data format, its evaluation's prompts and its number of samples.
        ask: makes of the recipe's own prompts what the prefix met their like as in training; see `prefixkit.data.ask`.

    Returns:
        Of inputs to answer, as many distinct ones as there are samples to write, in the order of their content's hash.
        Of free text, or where the recipe has prompts, those in turn.
    """
    settings = recipe.evaluation
    if answers_inputs(recipe):
        return _inputs(test, settings.samples)
    rows = pick(test, settings.heldout_rows)
    given = [*map(ask, settings.prompts or ())] or list(dict.fromkeys(example.prompt for example in rows))
    prompts = tuple(islice(cycle(given), settings.samples))
    return Asked(prompts, tuple(pick(test, settings.samples)))


def _inputs(test: Sequence[Example], samples: int) -> Asked:
    """Return distinct inputs, with the answers of all their rows."""
    groups: dict[str, list[Example]] = {}
    for example in pick(test, len(test)):
        groups.setdefault(example.prompt, []).append(example)
    prompts = sorted(groups, key=content_hash)[:samples]
    return Asked(
        prompts=tuple(prompts),
        people=tuple(groups[prompt][0] for prompt in prompts),
        references=tuple(tuple(example.answer for example in groups[prompt]) for prompt in prompts),
    )
