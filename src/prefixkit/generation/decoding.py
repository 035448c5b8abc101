"""From a batch of prompts to the ids of new tokens. Only prefixkit's own settings count.

A model's own generation defaults (temperatures, penalties, suppressed tokens that came with its files) would
make the same recipe mean different things for different models, so they are set aside while we generate.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import transformers
from jaxtyping import Int
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from prefixkit.config import GenerationConfig
from prefixkit.generation.dice import TokenChooser, roll
from prefixkit.generation.prompts import pad
from prefixkit.models import Base
from prefixkit.models.weights import input_device


def generate_ids(
    base: Base, rows: Sequence[list[int]], settings: GenerationConfig, *, seed: int, places: Sequence[int],
    ends: bool = True, **options: Any,
) -> Int[Tensor, "b n"]:  # fmt: skip
    """Return the new token ids of one batch, padding behind the end of text included.

    Args:
        base: the frozen model, with whatever it is to read attached.
        rows: token ids of each prompt.
        settings: how to sample.
        seed: of the dice.
        places: each row's place in the caller's list of prompts.
        ends: whether a text may end before it has as many tokens as the settings allow.
        options: for transformers' `generate`, such as a streamer.

    Raises:
        ModelError: the model's logits are not finite, or the tokenizer cannot pad.
    """
    batch = pad(base, rows)
    dice = roll(seed, places, settings.max_new_tokens).to(input_device(base.model))
    # An encoder-decoder's texts begin with its start token alone; what it read stands elsewhere.
    begun = batch.is_text if base.start_token_id is None else batch.is_text.new_zeros(len(rows), 1)
    with _set_aside(base.model) as own, _contiguous_head(base.model):
        ours = transformers.GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,  # the dice choose, see dice.py
            eos_token_id=_end_ids(base, own) if ends else None,
            pad_token_id=base.tokenizer.pad_token_id,
            use_cache=True,
            decoder_start_token_id=base.start_token_id,
            forced_bos_token_id=getattr(own, "forced_bos_token_id", None),  # mBART's language
        )
        out = base.model.generate(  # type: ignore[operator]
            input_ids=batch.input_ids,
            attention_mask=batch.is_text.long(),
            generation_config=ours,
            logits_processor=LogitsProcessorList([TokenChooser(settings, dice, begun)]),
            **options,
        )
    new: Tensor = out[:, begun.shape[1] :]
    return new


#: Models whose own generation defaults are set aside, those defaults, and how many calls want them to be.
_aside: WeakKeyDictionary[PreTrainedModel, tuple[Any, int]] = WeakKeyDictionary()
_changing = Lock()


@contextmanager
def _set_aside(model: PreTrainedModel) -> Iterator[Any]:
    """Set the model's own generation defaults aside, from which transformers fills what ours leave open; yields them.

    Threads may generate at the same time: the last one brings them back.
    """
    with _changing:
        own, calls = _aside.get(model, (model.generation_config, 0))
        _aside[model] = own, calls + 1
        start = getattr(own, "decoder_start_token_id", None)  # `Base` asks for it meanwhile
        model.generation_config = transformers.GenerationConfig(decoder_start_token_id=start)
    try:
        yield own
    finally:
        with _changing:
            own, calls = _aside.pop(model)
            if calls > 1:
                _aside[model] = own, calls - 1
            else:
                model.generation_config = own


@contextmanager
def _contiguous_head(model: PreTrainedModel) -> Iterator[None]:
    """Give the head contiguous states: transformers hands it the last column of the prompts, a slice.

    For a slice of a batch torch's matmul copies the head's weight once per row (pytorch/pytorch#151934): 3.6 GB
    and seconds for 64 rows of a 135M model.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _end_ids(base: Base, own: Any) -> list[int] | None:
    """Tokens that end a text: the tokenizer's EOS, and those the model's own defaults name."""
    named = getattr(own, "eos_token_id", None)
    ids = [base.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return sorted({token for token in ids if token is not None}) or None


def decode(base: Base, ids: list[int]) -> str:
    """Return the text of token ids, without special tokens and with every space."""
    return str(base.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
