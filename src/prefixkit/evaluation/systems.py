"""The systems that are compared: the prefix, the base model, and the base model with an instruction."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from prefixkit.data import NO_LOSS, Example
from prefixkit.models import Base
from prefixkit.models.specials import Ids, opening_ids
from prefixkit.prefix import Prefix

_SEPARATOR = "\n"


class SystemName(StrEnum):
    """What writes or scores a text."""

    PREFIX = "prefix"
    BASE = "base"
    INSTRUCTION = "instruction"


@dataclass(frozen=True)
class System:
    """The frozen base model, steered in one way or in none.

    The instruction is plain text, put on a line of its own before the prompt, for instruction-tuned models
    too: their chat template would put other tokens around the text whose loss is compared, and turn a text to
    be continued into a question to be answered.

    Attributes:
        name: which system this is.
        prefix: what the model reads, if anything.
        instruction: the line before the prompt, if any.
    """

    name: SystemName
    prefix: Prefix | None = None
    instruction: str | None = None

    @property
    def key(self) -> str:
        """What stands before this system's keys in scores.json; nothing for the prefix."""
        return "" if self.name is SystemName.PREFIX else f"{self.name}."

    @property
    def trained_parameters(self) -> int:
        """Numbers this system had to learn."""
        return 0 if self.prefix is None else self.prefix.trained_parameters

    def prompts(self, prompts: Iterable[str]) -> list[str]:
        """Return what this system is asked to continue."""
        return [self._lead + prompt for prompt in prompts]

    def examples(self, base: Base, examples: Sequence[Example]) -> list[Example]:
        """Return what this system is scored on: the same scored tokens, behind the instruction.

        The instruction's tokens go behind the tokenizer's opening (BOS), without loss; every other token
        stays as it is. An encoder reads the instruction before its text.
        """
        opening, lead = opening_ids(base.tokenizer), self._lead_ids(base)
        return [_with_lead(example, opening, lead) for example in examples] if lead else list(examples)

    def source_tokens(self, base: Base, max_tokens: int) -> int:
        """Return how many tokens an encoder reads of a prompt: as many as in training, behind the instruction."""
        return max_tokens + len(self._lead_ids(base))

    def _lead_ids(self, base: Base) -> Ids:
        return tuple(base.tokenizer(self._lead, add_special_tokens=False)["input_ids"]) if self._lead else ()

    @property
    def _lead(self) -> str:
        return "" if self.instruction is None else self.instruction + _SEPARATOR


def system_of(prefix: Prefix) -> System:
    """Return the system that reads a prefix."""
    return System(SystemName.PREFIX, prefix=prefix)


def systems_to_compare(prefix: Prefix | None, instruction: str | None) -> list[System]:
    """Return the prefix, if there is one yet, and its baselines; without an instruction that one is missing."""
    systems = [system_of(prefix)] if prefix is not None else []
    systems.append(System(SystemName.BASE))
    if instruction:
        systems.append(System(SystemName.INSTRUCTION, instruction=instruction))
    return systems


def _with_lead(example: Example, opening: Ids, lead: Ids) -> Example:
    """Put the instruction behind the opening of the text that is read: an encoder's, or the one that is continued."""
    read = example.input_ids if example.source_ids is None else example.source_ids
    cut = len(opening) if read[: len(opening)] == opening else 0
    longer = read[:cut] + lead + read[cut:]
    if example.source_ids is not None:
        return replace(example, source_ids=longer)
    labels = example.labels[:cut] + (NO_LOSS,) * len(lead) + example.labels[cut:]
    return replace(example, input_ids=longer, labels=labels)
