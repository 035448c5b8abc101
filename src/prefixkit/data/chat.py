"""Conversations through the model's own chat template, with loss on the assistant's turns only."""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from prefixkit.data.encoding import Piece
from prefixkit.data.rows import ASSISTANT, Message, Row
from prefixkit.errors import DataError
from prefixkit.models.specials import Ids

#: What templates that write today's date (Llama 3) are told: those of one prefix must not change from day to day.
_DAY = datetime(2024, 7, 26)
_TODAY = re.compile(r"strftime_now\(\s*(['\"])([^'\"]*)\1\s*\)")
_TELLS_TIME = re.compile(r"strftime_now\s*\(")
_MARKS_TURNS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise if the tokenizer cannot render conversations.

    Raises:
        DataError: it has no chat template, or several and none of them is the default.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "data.format: messages needs a chat template, and the tokenizer of this base model has none; "
            "use an instruction-tuned model, or format text or input_target"
        )
    try:
        template = _template(tokenizer)
    except ValueError:
        raise DataError(
            f"data.format: the tokenizer of this base model has {len(tokenizer.chat_template)} chat templates, and "
            "none of them is called default; set tokenizer.chat_template to one in its files"
        ) from None
    if _TELLS_TIME.search(template):
        raise DataError(
            "data.format: the chat template of this base model writes the date in a format that is not spelled out, so "
            "a prefix would meet other texts every day; set tokenizer.chat_template to one that does not"
        )


def template_marks_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the template itself says which tokens the assistant generates."""
    return bool(_MARKS_TURNS.search(tokenizer.get_chat_template()))


def encode_marked(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[Ids, tuple[bool, ...]]:
    """Return the ids of a conversation, and which of them the template's own marks make learned.

    Raises:
        DataError: the template refuses the conversation.
    """
    try:
        encoded: Any = tokenizer.apply_chat_template(
            _plain(row.messages[: _last_reply(row) + 1]),
            return_dict=True,
            return_assistant_tokens_mask=True,
            chat_template=_template(tokenizer),
        )
    except TemplateError as error:
        raise _refused(row, error) from None
    return tuple(encoded["input_ids"]), tuple(bool(mark) for mark in encoded["assistant_masks"])


def conversation_pieces(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Cut a rendered conversation into pieces, the assistant's turns learned; none after the last.

    The conversation is rendered up to each of the assistant's turns, without it and with it. Each rendering
    must begin with the one before: only then do the cuts mean what they say, and does generation see the same
    text.

    Raises:
        DataError: the template refuses the conversation, or rewrites earlier turns as later ones arrive.
    """
    pieces: list[Piece] = []
    done = ""
    for turn, message in enumerate(row.messages):
        if message.role != ASSISTANT:
            continue
        before = _render(row, turn, tokenizer, asks_for_reply=True)
        after = _render(row, turn + 1, tokenizer, asks_for_reply=False)
        if not before.startswith(done) or not after.startswith(before):
            raise DataError(
                f"row {row.number}: the chat template is not prefix-stable: with message {turn + 1} it "
                "changes what stands before; mark the assistant's turns in it with {% generation %}, "
                "or use format input_target"
            )
        pieces += [Piece(before[len(done) :], is_learned=False), Piece(after[len(before) :], is_learned=True)]
        done = after
    return pieces


def chat_prompt(row: Row, tokenizer: PreTrainedTokenizerBase, opening: Ids) -> str:
    """Return the rendered conversation up to the assistant's last turn, ready for its reply.

    A BOS that the template writes and the tokenizer adds by itself (`opening`) is left to the tokenizer, so
    that tokenising the prompt as any other text gives it once.
    """
    rendered = _render(row, _last_reply(row), tokenizer, asks_for_reply=True)
    bos = tokenizer.bos_token
    return rendered.removeprefix(bos) if bos and opening == (tokenizer.bos_token_id,) else rendered


def _render(row: Row, turns: int, tokenizer: PreTrainedTokenizerBase, *, asks_for_reply: bool) -> str:
    if turns == 0:  # templates expect at least one message; the assistant speaks first here
        return ""
    try:
        return str(
            tokenizer.apply_chat_template(
                _plain(row.messages[:turns]),
                tokenize=False,
                add_generation_prompt=asks_for_reply,
                chat_template=_template(tokenizer),
            )
        )
    except TemplateError as error:
        raise _refused(row, error) from None


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template, with a day of its own in place of the date on which it is rendered."""
    return _TODAY.sub(lambda found: repr(_DAY.strftime(found[2])), tokenizer.get_chat_template())


def _last_reply(row: Row) -> int:
    """Place of the assistant's last turn among the messages; what follows it teaches nothing."""
    return max(turn for turn, message in enumerate(row.messages) if message.role == ASSISTANT)


def _refused(row: Row, error: TemplateError) -> DataError:
    return DataError(f"row {row.number}: the chat template refuses this conversation: {error}")


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
