"""Generating texts: many at once, or one as a stream."""

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from prefixkit.config import GenerationConfig
from prefixkit.errors import DataError
from prefixkit.generation.decoding import decode, generate_ids
from prefixkit.generation.prompts import check_length, encode_prompts
from prefixkit.injection import attach
from prefixkit.models import Base
from prefixkit.prefix import Prefix


def generate_texts(
    base: Base,
    prompts: Sequence[str],
    settings: GenerationConfig | None = None,
    *,
    seed: int = 0,
    prefix: Prefix | Sequence[Prefix | None] | None = None,
    source_tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Continue every prompt once.

    The same seed gives the same texts whatever torch's global generator holds, which stays untouched. The
    dice of a text depend on the seed and on its place in `prompts` alone; the batch size changes only the
    rounding of the model's own arithmetic.

    Args:
        base: the frozen model, with nothing attached.
        prompts: what to continue; repeat one to get several continuations of it. An empty one starts from the
            tokenizer's BOS token.
        settings: how to sample, as a recipe's defaults do if left out; texts are generated `batch_size` at a time,
            those of similar length together.
        seed: 0 is a seed like any other.
        prefix: the prefix every text is generated with; or one per text, or None, of any lengths: they share batches.
            What a LoRA beside a prefix changes in the layers must be the same for all.
        source_tokens: for an encoder-decoder, most tokens of a prompt that its encoder reads; all if left out.
        on_progress: called with the texts done and the texts in all, after each batch.

    Returns:
        The continuations, in the order of the prompts, without the prompt and without special tokens.

    Raises:
        DataError: a single text was given, the prefixes are not one per text, a prompt is empty and there is no BOS
            token, or prefix, prompt and new tokens exceed the context.
        InjectionError: prefixes cannot be attached, or not together.
        ModelError: the model's logits are not finite, or the tokenizer cannot pad.
    """
    if isinstance(prompts, str):
        raise DataError("prompts: expected a list of prompts, got one text; write [prompt]")
    if not prompts:
        return []
    settings = GenerationConfig() if settings is None else settings
    is_own = isinstance(prefix, Sequence)  # one per text
    each = list(prefix) if isinstance(prefix, Sequence) else [prefix]
    if is_own and len(each) != len(prompts):
        raise DataError(f"prefix: expected one for each of {len(prompts)} prompts, or one for all, got {len(each)}")
    encoded = encode_prompts(base, prompts, source_tokens=source_tokens)
    for own, rows in zip(each, [[row] for row in encoded] if is_own else [encoded], strict=True):
        check_length(base, rows, max_new_tokens=settings.max_new_tokens, prefix_tokens=_offset(own))
    order = sorted(range(len(encoded)), key=lambda place: -len(encoded[place]))
    texts = [""] * len(prompts)
    done = 0
    with attach(base.model, prefix) as handle:  # all prefixes at once: they go together, or none is used
        for start in range(0, len(order), settings.batch_size):
            places = order[start : start + settings.batch_size]
            rows = [encoded[place] for place in places]
            if is_own and any(own is not None for own in each):
                handle.switch([each[place] for place in places])
            new = generate_ids(base, rows, settings, seed=seed, places=places)
            for place, row, ids in zip(places, rows, new, strict=True):
                texts[place] = _continuation(base, row, ids.tolist())
            done += len(places)
            if on_progress is not None:
                on_progress(done, len(prompts))
    return texts


def stream_text(
    base: Base, prompt: str, settings: GenerationConfig, *, seed: int, prefix: Prefix | None = None
) -> Iterator[str]:
    """Continue one prompt, piece by piece as it is generated.

    The pieces joined are what `generate_texts` returns for this prompt alone. The model stays attached until
    the iterator is exhausted or closed; closing it early stops the generation.

    Args:
        base: the frozen model, with nothing attached.
        prompt: what to continue.
        settings: how to sample.
        seed: 0 is a seed like any other.
        prefix: the prefix to generate with.

    Raises:
        DataError: as for `generate_texts`, at once. What goes wrong while generating is raised from the
            iterator.
    """
    row = encode_prompts(base, [prompt])[0]
    check_length(base, [row], max_new_tokens=settings.max_new_tokens, prefix_tokens=_offset(prefix))
    return _stream(base, row, settings, seed, prefix)


def _continuation(base: Base, prompt: list[int], new: list[int]) -> str:
    """Return the text of the new ids as it follows the prompt.

    Some tokenizers drop the space before the first token of what they decode, so both are decoded together
    and the prompt is cut off again. What an encoder-decoder writes follows nothing.
    """
    if base.start_token_id is not None:
        return decode(base, new)
    before, whole = decode(base, prompt), decode(base, prompt + new)
    return whole[len(before) :] if whole.startswith(before) else decode(base, new)


def _offset(prefix: Prefix | None) -> int:
    return 0 if prefix is None else prefix.position_offset


class _Queued(BaseStreamer):
    """Hands every new token id to another thread; transformers sends the prompt first, which is not new."""

    def __init__(self, queue: "SimpleQueue[int | BaseException | None]") -> None:
        self._queue, self._is_prompt = queue, True

    def put(self, value: Tensor) -> None:
        if not self._is_prompt:
            self._queue.put(int(value.flatten()[0]))
        self._is_prompt = False

    def end(self) -> None:
        """The thread itself says when it is done, also when it failed."""


class _Stopped(StoppingCriteria):
    """Ends the generation when nobody listens any more."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return torch.full((len(input_ids),), self._event.is_set(), dtype=torch.bool, device=input_ids.device)


#: What a tokenizer with byte fallback calls one byte of a character it has no token for.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def _stream(base: Base, row: list[int], settings: GenerationConfig, seed: int, prefix: Prefix | None) -> Iterator[str]:
    queue: SimpleQueue[int | BaseException | None] = SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        try:
            stopping = StoppingCriteriaList([_Stopped(stop)])
            streamer = _Queued(queue)
            generate_ids(base, [row], settings, seed=seed, places=[0], streamer=streamer, stopping_criteria=stopping)
            queue.put(None)
        except BaseException as error:  # raised again where the text is read
            queue.put(error)

    with attach(base.model, prefix):
        thread = threading.Thread(target=work, name="prefixkit-stream", daemon=True)
        thread.start()
        try:
            yield from _pieces(base, row, queue)
        finally:
            stop.set()
            thread.join()


def _pieces(base: Base, row: list[int], queue: "SimpleQueue[int | BaseException | None]") -> Iterator[str]:
    """Yield the text that each token adds, holding back characters whose bytes are not complete yet."""
    new: list[int] = []
    sent = ""
    while (item := queue.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        new.append(item)
        if _BYTE.fullmatch(str(base.tokenizer.convert_ids_to_tokens(item))):
            continue  # what a run of bytes says, one more of them may unsay
        text = _continuation(base, row, new)
        if text.startswith(sent) and len(text) > len(sent) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(sent) :]
            sent = text
    text = _continuation(base, row, new)
    if len(text) > len(sent):
        yield text[len(sent) :]
