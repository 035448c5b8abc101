"""A row of a data set, as read: text, a pair, or a conversation, with its label."""

import re
from dataclasses import dataclass
from itertools import takewhile

ASSISTANT = "assistant"
"""Role of the turns a conversation teaches."""

_PART, _TURN = " \x00 ", " \x01 "
"""Between the parts of a row's content; the spaces let white space at a part's ends be folded away."""

_WHOLE_NUMBER = re.compile(r"([+-]?\d+)\.0+")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text and its label, for the judge."""

    text: str
    label: str


@dataclass(frozen=True, slots=True)
class Row:
    """One row: exactly one of `text`, the pair `input` and `target`, `messages`, or `words` is filled.

    `number` counts the rows of the source from 1, for messages to people. `label` is the label's name (see
    `label_name`), None without a label column; `tags` are those of the words.
    """

    number: int
    text: str | None = None
    input: str | None = None
    target: str | None = None
    messages: tuple[Message, ...] = ()
    label: str | None = None
    words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Everything it is labelled with: its own label, and those of its words."""
        return self.tags if self.label is None else (self.label, *self.tags)

    @property
    def learned(self) -> str:
        """What the loss is on: the text, the target, or the assistant's turns; where labels are learned, what is read.

        Word counts count this.
        """
        if self.text is not None:
            return self.text
        if self.words:
            return " ".join(self.words)
        if self.target is not None:
            return self.target
        return "\n".join(message.content for message in self.messages if message.role == ASSISTANT)

    @property
    def last_reply(self) -> str | None:
        """The last of the assistant's turns, in a conversation."""
        replies = (message.content for message in reversed(self.messages) if message.role == ASSISTANT)
        return next(replies, None)

    @property
    def given(self) -> str:
        """What stands before: the input, or the turns before the assistant's first; empty for plain text."""
        if self.input is not None:
            return self.input
        return _flat(tuple(takewhile(lambda message: message.role != ASSISTANT, self.messages)))

    @property
    def content(self) -> str:
        """Everything the row says; two rows of the same content are duplicates."""
        if self.messages:
            return _flat(self.messages)
        return f"{self.given}{_PART}{self.learned}"

    @property
    def split_key(self) -> str:
        """What decides the split: the text, or what is given, so that no input is trained and tested on."""
        return self.given or self.learned


def label_name(value: str | int | float | bool) -> str:
    """Return a label as text, the same for 1, 1.0 and ``"1"``, and for True and ``"true"``.

    Files differ in how they type a label (CSV has only text); names make them comparable.
    """
    if isinstance(value, bool):
        return str(value).lower()
    name = str(value).strip()
    if name.lower() in ("true", "false"):
        return name.lower()
    whole = _WHOLE_NUMBER.fullmatch(name)
    return whole[1] if whole else name


def _flat(messages: tuple[Message, ...]) -> str:
    return _TURN.join(f"{message.role}{_PART}{message.content}" for message in messages)
