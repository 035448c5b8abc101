"""From rows to examples: the token ids a model reads, and which of them it is asked to predict.

Labels follow transformers' convention: `labels[i]` is `input_ids[i]` where position i has loss and -100 where
it has none; the model shifts them. The first token of an example never has loss, for nothing stands before
it: with a BOS that is the BOS, which predicts the text's first token from the prefix; without BOS and prompt
it is the text's own first token, which is then read but not learned.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from prefixkit.config import DataConfig, Format
from prefixkit.data.chat import (
    chat_prompt,
    check_template,
    conversation_pieces,
    encode_marked,
    template_marks_turns,
)
from prefixkit.data.encoding import Piece, encode_pieces
from prefixkit.data.pairs import encode_pairs
from prefixkit.data.rows import ASSISTANT, Message, Row
from prefixkit.errors import DataError
from prefixkit.models.specials import Ids, opening_ids
from prefixkit.texts import clean_text

NO_LOSS = -100
"""Label of a position without loss."""


@dataclass(frozen=True, slots=True)
class Example:
    """One text, ready for the model.

    Attributes:
        prompt: what generation continues. Tokenised with the tokenizer's own special tokens, it gives the ids
            the example begins with (in a conversation of several replies: up to the last one). For an
            encoder-decoder it is what the encoder reads.
        text: what is learned, as text.
        input_ids: the whole example, BOS and EOS included where the tokenizer and the length ask for them.
        labels: as many as `input_ids`; -100 where there is no loss.
        source_ids: for an encoder-decoder, what its encoder reads; `input_ids` are then the decoder's.
        words: where words are labelled, those that have a label, in the order of `labels`.
        last_reply: in a conversation, the last of the assistant's turns; of several, `prompt` leads up to that one.
    """

    prompt: str
    text: str
    input_ids: Ids
    labels: Ids
    source_ids: Ids | None = None
    words: tuple[str, ...] = ()
    last_reply: str | None = None

    @property
    def answer(self) -> str:
        """What follows the prompt, as a person wrote it, whole."""
        return self.text if self.last_reply is None else self.last_reply

    def without_loss(self) -> "Example":
        """Return the example with nothing to predict."""
        return replace(self, labels=(NO_LOSS,) * len(self.labels))

    @property
    def num_tokens(self) -> int:
        """Number of tokens that are read, by encoder and decoder together."""
        return len(self.input_ids) + len(self.source_ids or ())

    @property
    def longest(self) -> int:
        """Number of tokens of the longest text in one stack."""
        return max(len(self.input_ids), len(self.source_ids or ()))

    @property
    def loss_tokens(self) -> int:
        """Number of tokens with loss."""
        return sum(label != NO_LOSS for label in self.labels)


@dataclass(frozen=True)
class BuiltExamples:
    """Examples, and what became of the rows they came from.

    Attributes:
        examples: in the order of the rows.
        truncated: examples cut at `max_tokens`.
        without_loss: rows left out because nothing learned remained of them within `max_tokens`.
    """

    examples: tuple[Example, ...]
    truncated: int
    without_loss: int


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A row's whole ids, before any cut."""

    prompt: str
    ids: Ids
    is_learned: tuple[bool, ...]


def build_examples(
    rows: Sequence[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, start: int | None = None
) -> BuiltExamples:
    """Turn rows into examples of at most `config.max_tokens` tokens.

    A text that fits whole ends in EOS, with loss, so that the model learns to stop; a text that was cut does
    not.

    Args:
        rows: what was read.
        config: the recipe's data section.
        tokenizer: the base model's.
        start: for an encoder-decoder, the token its decoder starts from; each of its two texts may have `max_tokens`.

    Raises:
        DataError: a row is longer than `max_tokens` and `truncate` is off; or, for conversations, the
            tokenizer has no chat template, or one that cannot be cut into turns, or the model has an encoder.
    """
    if start is not None:
        return _build_pairs(rows, config, tokenizer, start)
    encode = _encode_conversations if config.format is Format.MESSAGES else _encode_texts
    examples, truncated = [], 0
    for row, encoded in zip(rows, encode(rows, config, tokenizer), strict=True):
        length = len(encoded.ids)
        if length > config.max_tokens and not config.truncate:
            raise _too_long(row, f"{length} tokens", config)
        truncated += length > config.max_tokens
        ids = encoded.ids[: config.max_tokens]
        labels = tuple(
            token if learned and place > 0 else NO_LOSS
            for place, (token, learned) in enumerate(zip(ids, encoded.is_learned, strict=False))
        )
        examples.append(Example(encoded.prompt, row.learned, ids, labels, last_reply=row.last_reply))
    kept = tuple(example for example in examples if example.loss_tokens)
    return BuiltExamples(kept, truncated=truncated, without_loss=len(examples) - len(kept))


def _build_pairs(
    rows: Sequence[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase, start: int
) -> BuiltExamples:
    if config.format is Format.MESSAGES:
        raise DataError("data.format: messages needs a decoder-only base model; use input_target")
    sources = [config.prompt if row.input is None else row.input for row in rows]
    pairs = encode_pairs(sources, [row.learned for row in rows], tokenizer, start=start, max_tokens=config.max_tokens)
    for row, pair in zip(rows, pairs, strict=True):
        if pair.is_cut and not config.truncate:
            raise _too_long(row, "one of its texts has more tokens", config)
    examples = [
        Example(source, row.learned, pair.target, (NO_LOSS, *pair.target[1:]), pair.source)
        for row, source, pair in zip(rows, sources, pairs, strict=True)
    ]
    kept = tuple(example for example in examples if example.loss_tokens)
    return BuiltExamples(kept, sum(pair.is_cut for pair in pairs), without_loss=len(examples) - len(kept))


def _too_long(row: Row, what: str, config: DataConfig) -> DataError:
    return DataError(
        f"row {row.number}: {what}, more than data.max_tokens ({config.max_tokens}); "
        "raise it, or set data.truncate to true to cut longer rows"
    )


def text_pieces(row: Row, config: DataConfig) -> tuple[Piece, Piece]:
    """Return what stands before the learned text, and the learned text.

    For plain text a space joins the two unless the prompt is empty or ends in white space; for pairs the
    separator does, as part of what stands before.
    """
    if row.input is not None:
        return Piece(row.input + config.separator, is_learned=False), Piece(row.learned, is_learned=True)
    joint = " " if config.prompt and not config.prompt[-1].isspace() else ""
    return Piece(config.prompt, is_learned=False), Piece(joint + row.learned, is_learned=True)


def ask(text: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, has_encoder: bool = False) -> str:
    """Return a person's prompt as the prefix met its like in training: with the separator, or as a user's turn.

    It is cleaned as the data's inputs were (`data.clean_html`). A text to continue stays as it is.

    Raises:
        DataError: the data are conversations, and the tokenizer has no chat template or one that refuses this; or
            labels were learned.
    """
    if config.clean_html and config.format is not Format.TEXT:
        text = clean_text(text)
    if has_encoder:
        return text
    match config.format:
        case Format.TEXT:
            return text
        case Format.INPUT_TARGET:
            return text_pieces(Row(0, input=text, target=""), config)[0].text
        case Format.MESSAGES:
            check_template(tokenizer)
            turns = (Message("user", text), Message(ASSISTANT, ""))
            return chat_prompt(Row(0, messages=turns), tokenizer, opening_ids(tokenizer))
        case Format.CLASSES | Format.TAGS:
            raise DataError("this artefact learned labels, and writes no text; see `prefixkit classify`")


def _encode_texts(rows: Sequence[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[_Encoded]:
    opening = opening_ids(tokenizer)
    closing = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    pieces = [text_pieces(row, config) for row in rows]
    for (before, _), (prompt_ids, text_ids) in zip(pieces, encode_pieces(pieces, tokenizer), strict=True):
        read, learned = opening + tuple(prompt_ids), tuple(text_ids) + closing
        yield _Encoded(before.text, read + learned, (False,) * len(read) + (True,) * len(learned))


def _encode_conversations(
    rows: Sequence[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[_Encoded]:
    check_template(tokenizer)
    opening = opening_ids(tokenizer)
    prompts = [chat_prompt(row, tokenizer, opening) for row in rows]
    if template_marks_turns(tokenizer):
        for row, prompt in zip(rows, prompts, strict=True):
            yield _opened(_Encoded(prompt, *encode_marked(row, tokenizer)), opening)
        return
    pieces = [conversation_pieces(row, tokenizer) for row in rows]
    for row_pieces, parts, prompt in zip(pieces, encode_pieces(pieces, tokenizer), prompts, strict=True):
        ids: list[int] = []
        learned: list[bool] = []
        for piece, part in zip(row_pieces, parts, strict=True):
            used = _until_stop(part, tokenizer.eos_token_id) if piece.is_learned else 0
            ids += part
            learned += [True] * used + [False] * (len(part) - used)
        yield _opened(_Encoded(prompt, tuple(ids), tuple(learned)), opening)


def _opened(encoded: _Encoded, opening: Ids) -> _Encoded:
    """Put the tokenizer's opening (BOS) before a conversation whose template writes none, as before any other text."""
    if encoded.ids[: len(opening)] == opening:
        return encoded
    return _Encoded(encoded.prompt, opening + encoded.ids, (False,) * len(opening) + encoded.is_learned)


def _until_stop(ids: Ids, eos_token_id: int | None) -> int:
    """Length of a reply up to its EOS; a template's line break after it is never generated."""
    if eos_token_id is None or eos_token_id not in ids:
        return len(ids)
    return len(ids) - ids[::-1].index(eos_token_id)
