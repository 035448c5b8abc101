"""From prompts to a batch a model can continue: token ids, padded on the left, that fit the context."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from prefixkit.errors import DataError, ModelError
from prefixkit.models import Base
from prefixkit.models.specials import source_ids
from prefixkit.models.weights import input_device
from prefixkit.texts import is_unicode


@dataclass(frozen=True)
class Batch:
    """Prompts of one batch, padded on the left so that all of them end where generation begins.

    What an encoder reads is padded on the right, as in training: there, generation begins elsewhere.
    """

    input_ids: Int[Tensor, "b s"]
    is_text: Bool[Tensor, "b s"]


def encode_prompts(base: Base, prompts: Sequence[str], *, source_tokens: int | None = None) -> list[list[int]]:
    """Return each prompt's token ids, with the special tokens the tokenizer puts before a text.

    An empty prompt is the BOS token alone. What a tokenizer puts behind a text (EOS) is left out: the text
    is to go on. An encoder reads its text with all of them.

    Args:
        base: the base model.
        prompts: what is to be continued, or read by an encoder.
        source_tokens: most tokens an encoder reads of a prompt; a longer one is cut, as in training.

    Raises:
        DataError: a prompt is empty and the tokenizer has no BOS token, or it is no text that can be encoded.
        UnsupportedModelError: the model is an encoder.
    """
    base.require_writer()
    for prompt in prompts:
        if not is_unicode(prompt):
            raise DataError("the prompt holds half a character (a lone surrogate); give it as UTF-8")
    if base.start_token_id is not None:
        return [list(ids) for ids in source_ids(prompts, base.tokenizer, max_tokens=source_tokens)]
    tokenizer = base.tokenizer
    encoded = []
    for prompt in prompts:
        # verbose=False: lengths are checked below, with the prefix and the new tokens counted in.
        whole: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
        plain: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        ids = _opening(whole, plain) + plain
        if not plain and tokenizer.bos_token_id not in ids:
            if tokenizer.bos_token_id is None:
                raise DataError(
                    f"an empty prompt starts from the BOS token, and the tokenizer of {base.id} has none; give a prompt"
                )
            ids = [tokenizer.bos_token_id]
        encoded.append(ids)
    return encoded


def check_length(
    base: Base,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    prefix_tokens: int,
    setting: str = "generation.max_new_tokens",
) -> None:
    """Raise if a prompt, the prefix and the new tokens together exceed the model's context; a setting can be lowered.

    Raises:
        DataError: they do; the message gives the numbers.
    """
    limit = base.context_tokens
    if limit is None:
        return
    longest = max(map(len, prompts))
    if base.start_token_id is not None:  # each stack has positions of its own, and no prefix takes any
        what, needed = f"prompt {longest} or {max_new_tokens} new tokens", max(longest, 1 + max_new_tokens)
    else:
        before = f"prefix {prefix_tokens} + " if prefix_tokens else ""
        what, needed = (
            f"{before}prompt {longest} + {max_new_tokens} new tokens",
            prefix_tokens + longest + max_new_tokens,
        )
    if needed > limit:
        raise DataError(f"{what} exceed the model's context of {limit}; shorten the prompt or lower {setting}")


def pad(base: Base, rows: Sequence[list[int]]) -> Batch:
    """Return the rows as one batch on the model's device, padded where their kind of model wants it.

    Raises:
        ModelError: the tokenizer has no padding token.
    """
    fill = base.tokenizer.pad_token_id
    if fill is None:
        raise ModelError(f"{base.id}: its tokenizer has no padding token; set pad_token in it")
    width = max(map(len, rows))
    gaps = [[fill] * (width - len(row)) for row in rows]
    on_right = base.start_token_id is not None
    ids = torch.tensor([row + gap if on_right else gap + row for row, gap in zip(rows, gaps, strict=True)])  # [b, s]
    lengths = torch.tensor([len(row) for row in rows])[:, None]  # [b, 1]
    places = torch.arange(width)[None]  # [1, s]
    is_text = places < lengths if on_right else places >= width - lengths  # [b, s]
    device = input_device(base.model)
    return Batch(ids.to(device), is_text.to(device))


def _opening(whole: list[int], plain: list[int]) -> list[int]:
    """What stands before the plain ids in the whole ones."""
    if not plain:
        return whole[:1]  # of an empty text the tokenizer's first special token is the opening
    starts = (i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain)
    return whole[: next(starts, 0)]
