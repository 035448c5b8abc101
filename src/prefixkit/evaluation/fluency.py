"""Fluency: how natural the unprefixed base model finds generated texts."""

from collections.abc import Callable, Sequence

from prefixkit.data import NO_LOSS, Example
from prefixkit.data.encoding import Piece, encode_pieces
from prefixkit.errors import EvaluationError
from prefixkit.evaluation.loss import TokenLosses, heldout_loss
from prefixkit.models import Base
from prefixkit.models.specials import opening_ids, source_ids, target_words


def fluency_losses(
    base: Base,
    prompts: Sequence[str],
    texts: Sequence[str],
    *,
    source_tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TokenLosses:
    """Measure generated texts under the base model without prefix, given their prompts.

    The perplexity of all tokens together is the measure; lower is more natural, but a text that repeats
    itself is natural too, so read it beside the repetition rate.

    Args:
        base: the frozen model, with nothing attached.
        prompts: what each text continues, without any instruction the system was given; not scored.
        texts: the continuations, scored.
        source_tokens: for an encoder-decoder, most tokens of a prompt that its encoder reads.
        on_progress: called with the texts done and the texts in all.

    Raises:
        EvaluationError: every text is empty.
    """
    if not any(texts):
        raise EvaluationError(f"all {len(texts)} generated texts are empty; there is nothing to score")
    if base.start_token_id is None:
        examples = _continuations(base, prompts, texts)
    else:
        examples = _answers(base, prompts, texts, source_tokens)
    # An empty text after an empty prompt without BOS has no token at all, and costs nothing.
    filled = [place for place, example in enumerate(examples) if example.input_ids]
    losses = heldout_loss(base, [examples[place] for place in filled], on_progress=on_progress)
    nats, tokens = [0.0] * len(texts), [0] * len(texts)
    for place, cost, count in zip(filled, losses.nats, losses.tokens, strict=True):
        nats[place], tokens[place] = cost, count
    return TokenLosses(tuple(nats), tuple(tokens))


def _continuations(base: Base, prompts: Sequence[str], texts: Sequence[str]) -> list[Example]:
    opening = opening_ids(base.tokenizer)
    pieces = [
        (Piece(prompt, is_learned=False), Piece(text, is_learned=True))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    examples = []
    for (prompt, text), (before, after) in zip(pieces, encode_pieces(pieces, base.tokenizer), strict=True):
        read = opening + before or _bos(base)
        scored = after[: _room(base, read)]
        examples.append(Example(prompt.text, text.text, read + scored, (NO_LOSS,) * len(read) + scored))
    return examples


def _answers(base: Base, prompts: Sequence[str], texts: Sequence[str], source_tokens: int | None) -> list[Example]:
    """What an encoder-decoder is scored on: the text behind what it writes before every text; without end of text."""
    assert base.start_token_id is not None
    opening, written = target_words(texts, base.tokenizer)
    before = (base.start_token_id, *opening)
    written = [ids[: _room(base, before)] for ids in written]
    read = source_ids(prompts, base.tokenizer, max_tokens=source_tokens)
    return [
        Example(prompt, text, before + ids, (NO_LOSS,) * len(before) + ids, source)
        for prompt, text, ids, source in zip(prompts, texts, written, read, strict=True)
    ]


def _room(base: Base, before: tuple[int, ...]) -> int | None:
    """Return how many tokens still fit the context: a text may be longer read than it was written, by broken bytes."""
    return None if base.context_tokens is None else max(0, base.context_tokens - len(before))


def _bos(base: Base) -> tuple[int, ...]:
    """Where generation starts from an empty prompt."""
    token = base.tokenizer.bos_token_id
    return () if token is None else (token,)
