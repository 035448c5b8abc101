"""Held-out loss: how many nats per token unseen text costs a model, with a prefix or without."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefixkit.data import NO_LOSS, Collator, Example, input_ends
from prefixkit.errors import EvaluationError, NotFiniteError
from prefixkit.evaluation.intervals import Ratio
from prefixkit.injection import attach
from prefixkit.models import Base
from prefixkit.models.weights import input_device
from prefixkit.prefix import Prefix

#: Logits a batch may hold at once; a long text on a large vocabulary gets a smaller batch.
MOST_LOGITS = 16_000_000


@dataclass(frozen=True)
class TokenLosses:
    """Negative log-likelihood of each example, in the order given.

    Attributes:
        nats: summed over the example's scored tokens.
        tokens: how many those are.
        late: the same of the second half of each example's scored tokens, the smaller where they are odd in number;
            None where that was not measured.
    """

    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    late: "TokenLosses | None" = None

    @property
    def mean(self) -> float:
        """Nats per token over all examples: every token counts the same, whatever the length of its text."""
        return self.ratio.value

    @property
    def perplexity(self) -> float:
        """``exp(mean)``: the number of equally likely next tokens that would be as surprising."""
        return math.exp(self.mean)

    @property
    def ratio(self) -> Ratio:
        """The mean as a ratio of sums, for its interval."""
        return Ratio(self.nats, tuple(map(float, self.tokens)))

    @property
    def early(self) -> "TokenLosses":
        """Those of the first halves, where `late` are those of the second."""
        assert self.late is not None
        nats = tuple(all_of_it - late for all_of_it, late in zip(self.nats, self.late.nats, strict=True))
        tokens = tuple(all_of_it - late for all_of_it, late in zip(self.tokens, self.late.tokens, strict=True))
        return TokenLosses(nats, tokens)

    def summed_by(self, keys: Sequence[str]) -> "TokenLosses":
        """Return those of all examples with the same key together, in the order of the keys' first examples."""
        places: dict[str, list[int]] = {}
        for place, key in enumerate(keys):
            places.setdefault(key, []).append(place)
        return TokenLosses(
            tuple(math.fsum(self.nats[place] for place in each) for each in places.values()),
            tuple(sum(self.tokens[place] for place in each) for each in places.values()),
            None if self.late is None else self.late.summed_by(keys),
        )

    def minus(self, other: "TokenLosses") -> Ratio:
        """Return the difference to another system's losses on the same scored tokens, text by text."""
        assert self.tokens == other.tokens
        nats = tuple(mine - theirs for mine, theirs in zip(self.nats, other.nats, strict=True))
        return Ratio(nats, tuple(map(float, self.tokens)))


def heldout_loss(
    base: Base,
    examples: Sequence[Example],
    *,
    prefix: Prefix | None = None,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> TokenLosses:
    """Measure what each example costs, teacher-forced as in training: token t is predicted from those before.

    Args:
        base: the frozen model, with nothing attached.
        examples: what to score; positions whose label is -100 are read but not scored.
        prefix: the prefix the model reads.
        batch_size: most examples per forward pass.
        on_progress: called with the examples done and the examples in all.

    Raises:
        EvaluationError: there is nothing to score, or an example does not fit the context.
        NotFiniteError: a loss is no finite number.
        UnsupportedModelError: the model writes no text.
    """
    base.require_writer()
    check_examples(base, examples, prefix_tokens=0 if prefix is None else prefix.position_offset)
    nats, late = [0.0] * len(examples), [0.0] * len(examples)
    done = 0
    collate = Collator(base.tokenizer.pad_token_id)
    with torch.no_grad(), attach(base.model, prefix) as handle:
        for places in _batches(base, examples, batch_size):
            batch = collate([examples[place] for place in places])
            with handle.infix_at(input_ends(batch["labels"])):
                losses = _batch_losses(base, batch)
            for place, (value, of_second_half) in zip(places, losses, strict=True):
                if not math.isfinite(value):
                    damaged = "base model" if prefix is None else "artefact"
                    raise NotFiniteError(
                        f"the loss of a text is {value}: the {damaged} is damaged or the dtype too narrow; "
                        "try model.dtype=float32"
                    )
                nats[place], late[place] = value, of_second_half
            done += len(places)
            if on_progress is not None:
                on_progress(done, len(examples))
    tokens = tuple(_scored(example) for example in examples)
    return TokenLosses(tuple(nats), tokens, TokenLosses(tuple(late), tuple(count // 2 for count in tokens)))


def _batch_losses(base: Base, batch: dict[str, Tensor]) -> list[tuple[float, float]]:
    """Return the summed loss of each row, and that of the second half of its scored tokens."""
    inputs = {name: tensor.to(input_device(base.model)) for name, tensor in batch.items()}
    labels: Int[Tensor, "b t"] = inputs.pop("labels")
    logits: Float[Tensor, "b t v"] = base.model(**inputs, use_cache=False).logits
    precise = torch.promote_types(logits.dtype, torch.float32)
    losses = []
    for row, expected in zip(logits[:, :-1], labels[:, 1:], strict=True):  # [t - 1, v], [t - 1]
        scored = expected != NO_LOSS
        # One row at a time: the whole batch in float32 would be the largest thing in memory.
        each = torch.nn.functional.cross_entropy(row[scored].to(precise), expected[scored], reduction="none").double()
        losses.append((each.sum().item(), each[len(each) - len(each) // 2 :].sum().item()))
    return losses


def _batches(base: Base, examples: Sequence[Example], batch_size: int) -> Iterator[list[int]]:
    """Yield the places of each batch, longest examples first: little is padded, memory fails early."""
    vocabulary = base.model.config.get_text_config().vocab_size
    order = sorted(range(len(examples)), key=lambda place: -len(examples[place].input_ids))
    while order:
        width = len(examples[order[0]].input_ids)
        rows = max(1, min(batch_size, MOST_LOGITS // (width * vocabulary)))
        yield order[:rows]
        order = order[rows:]


def check_examples(base: Base, examples: Sequence[Example], *, prefix_tokens: int) -> None:
    """Raise if there is nothing to score, or if an example does not fit the context behind the prefix.

    Raises:
        EvaluationError: either.
    """
    if not any(map(_scored, examples)):
        raise EvaluationError(f"{len(examples)} held-out texts, none with a token to score; give texts with loss")
    longest = max(example.longest for example in examples)
    limit = base.context_tokens
    if limit is not None and prefix_tokens + longest > limit:
        before = f"prefix {prefix_tokens} + " if prefix_tokens else ""
        raise EvaluationError(
            f"{before}text {longest} tokens exceed the model's context of {limit}; "
            "lower data.max_tokens or shorten what stands before the text"
        )


def _scored(example: Example) -> int:
    """Tokens that are scored; the first of a text has nothing before it to be predicted from."""
    return sum(label != NO_LOSS for label in example.labels[1:])
