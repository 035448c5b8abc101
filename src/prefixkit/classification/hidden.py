"""The hidden states a head looks at, of many texts, in batches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prefixkit.errors import DataError
from prefixkit.injection import attach
from prefixkit.models import Base
from prefixkit.models.reading import last_hidden_state, mean_state
from prefixkit.models.specials import Ids
from prefixkit.models.weights import input_device
from prefixkit.prefix import Prefix

#: Told how many texts are done, and of how many.
OnTexts = Callable[[int, int], None]


@torch.no_grad()
def hidden_at(
    base: Base,
    texts: Sequence[Ids],
    places: Sequence[Sequence[int] | None],
    *,
    prefix: Prefix | Sequence[Prefix | None] | None,
    batch_size: int = 32,
    on_progress: OnTexts | None = None,
) -> list[Float[Tensor, "k e"]]:
    """Return the last hidden states at the given places of each text, in the order given.

    Args:
        base: the frozen model, with nothing attached.
        texts: token ids of each text, special ones included.
        places: for each text, the positions wanted; None for the mean over the text instead.
        prefix: what the model reads: one prefix for all texts, or one (or None) for each.
        batch_size: most texts per forward pass.
        on_progress: told about progress.

    Raises:
        DataError: a text does not fit the context behind its prefix.
        InjectionError: a prefix does not fit the model; see `attach`.
    """
    prefixes = list(prefix) if isinstance(prefix, Sequence) else [prefix] * len(texts)
    _check_context(base, texts, prefixes)
    found: dict[int, Tensor] = {}
    shared = nullcontext() if isinstance(prefix, Sequence) else attach(base.model, prefix)
    with shared:
        for rows in _batches(texts, batch_size):
            own = attach(base.model, [prefixes[row] for row in rows]) if isinstance(prefix, Sequence) else nullcontext()
            with own:
                batch = _padded(base, [texts[row] for row in rows])
                hidden = last_hidden_state(base.model, batch)  # [b, t, e]
            means = mean_state(hidden, batch["attention_mask"], torch.promote_types(hidden.dtype, torch.float32))
            for row, states, mean in zip(rows, hidden, means, strict=True):
                at = places[row]
                found[row] = mean[None] if at is None else states[list(at)]  # [k, e]
            if on_progress is not None:
                on_progress(len(found), len(texts))
    return [found[row] for row in range(len(texts))]


def _batches(texts: Sequence[Ids], batch_size: int) -> Iterator[list[int]]:
    """Yield the row numbers of each batch, longest texts first: little is padded, memory fails early."""
    order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _padded(base: Base, texts: Sequence[Ids]) -> dict[str, Tensor]:
    pad = base.tokenizer.pad_token_id
    rows = [torch.tensor(ids) for ids in texts]
    ids = pad_sequence(rows, batch_first=True, padding_value=0 if pad is None else pad)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {name: each.to(input_device(base.model)) for name, each in (("input_ids", ids), ("attention_mask", mask))}


def _check_context(base: Base, texts: Sequence[Ids], prefixes: Sequence[Prefix | None]) -> None:
    limit = base.context_tokens
    for number, (ids, prefix) in enumerate(zip(texts, prefixes, strict=True), start=1):
        before = 0 if prefix is None else prefix.position_offset
        if limit is not None and before + len(ids) > limit:
            raise DataError(
                f"text {number}: prefix {before} + text {len(ids)} tokens exceed the model's context of {limit}; cut it"
            )
