"""Attention mass: which share of its attention a text token gives the prefix, by layer, head and text length.

    mass = sum_i softmax(q [P_K; K]^T * scale)_i          over the p virtual tokens i; with a gate, times the gate

A query that treated all keys alike would give ``p / (p + s)`` with `s` text keys in sight: the baseline. As text
grows, the prefix competes with more and more keys, and its mass falls: dilution. What is in sight is the text so far
in a decoder's self-attention, the whole text in an encoder's, and the encoder's whole text in cross-attention.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from prefixkit.data import Example
from prefixkit.errors import EvaluationError
from prefixkit.evaluation.attention_meter import PlacementMass
from prefixkit.evaluation.attention_readers import DecoderReader, SourceReader
from prefixkit.injection import attach
from prefixkit.models import Base
from prefixkit.models.inspect import Kind, inspect_model
from prefixkit.prefix import Geometry, Prefix


@dataclass(frozen=True)
class AttentionMass:
    """What `measure_mass` found.

    Attributes:
        geometry: of the model.
        placements: those that have virtual tokens, in the order of the geometry.
    """

    geometry: Geometry
    placements: tuple[PlacementMass, ...]


def measure_mass(
    base: Base,
    prefix: Prefix,
    examples: Sequence[Example],
    *,
    within: int,
    batch_size: int = 8,
    chunk_tokens: int = 256,
    on_progress: Callable[[int, int], None] | None = None,
) -> AttentionMass:
    """Measure the attention mass on a prefix while the model reads texts.

    Args:
        base: the frozen model, with nothing attached.
        prefix: what it reads.
        examples: the texts; every token counts, with loss or without.
        within: count the first tokens of each text only, except by length; where text is read both ways, it is cut
            there.
        batch_size: most texts per forward pass.
        chunk_tokens: a decoder-only model reads a longer text in pieces, so that memory does not grow with its square.
        on_progress: called with the texts read and the texts in all.

    Raises:
        EvaluationError: there is no text, a text does not fit the context, or a weight is not finite; or the model
            reads no text, or the prefix has no virtual tokens.
    """
    _check_model(base)
    _check_texts(base, prefix, examples)
    order = sorted(examples, key=lambda example: -example.longest)  # little is padded
    reader: DecoderReader | SourceReader
    if inspect_model(base.model).kind is Kind.DECODER:
        reader = DecoderReader(base, prefix, order, within=within, chunk_tokens=chunk_tokens)
    else:
        reader = SourceReader(base, prefix, order, within=within)
    with torch.no_grad(), attach(base.model, prefix):
        for start in range(0, len(order), batch_size):
            reader.read(order[start : start + batch_size])
            if on_progress is not None:
                on_progress(min(start + batch_size, len(order)), len(order))
    return AttentionMass(prefix.states.geometry, reader.results())


def _check_model(base: Base) -> None:
    """Refuse a model that reads something else than text, such as Whisper."""
    reads = base.model.main_input_name
    if reads != "input_ids":
        raise EvaluationError(
            f"{base.id}: attention mass is measured while a model reads text; {base.model.config.model_type} reads "
            f"{reads}"
        )


def _check_texts(base: Base, prefix: Prefix, examples: Sequence[Example]) -> None:
    if not any(prefix.states.lengths):
        raise EvaluationError("the prefix has no virtual tokens, so nothing is there to look at")
    if prefix.is_infix:
        raise EvaluationError("an infix is not seen by its input, and no share of attention is measured; give a prefix")
    longest = max((example.longest for example in examples), default=0)
    if not longest:
        raise EvaluationError("no text to read; give at least one with a token")
    limit = base.context_tokens
    if limit is not None and prefix.position_offset + longest > limit:
        raise EvaluationError(
            f"prefix {prefix.position_offset} + text {longest} tokens exceed the model's context of {limit}; "
            "give shorter texts"
        )
