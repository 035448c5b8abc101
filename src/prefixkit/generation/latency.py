"""How long a model takes for a token it writes, one text at a time."""

import time
from itertools import pairwise

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from prefixkit.config import GenerationConfig
from prefixkit.generation.decoding import generate_ids
from prefixkit.generation.prompts import check_length, encode_prompts
from prefixkit.injection import attach
from prefixkit.models import Base
from prefixkit.prefix import Prefix


def token_seconds(
    base: Base, prompt: str, *, tokens: int, prefix: Prefix | None = None, source_tokens: int | None = None
) -> list[float]:
    """Continue a prompt with the likeliest tokens, and return the seconds between one token and the next.

    The first token, for which the prompt is read, is not among them. The end of text is a token like any other, so that
    every system writes equally many.

    Args:
        base: the frozen model, with nothing attached.
        prompt: what to continue.
        tokens: how many times to return; one more token is written.
        prefix: what the model reads.
        source_tokens: for an encoder-decoder, most tokens of the prompt that its encoder reads.

    Raises:
        DataError, ModelError: as `generate_texts` does.
    """
    rows = encode_prompts(base, [prompt], source_tokens=source_tokens)
    taken = 0 if prefix is None else prefix.position_offset
    check_length(base, rows, max_new_tokens=tokens + 1, prefix_tokens=taken, setting="tokens")
    settings = GenerationConfig(max_new_tokens=tokens + 1, temperature=0.0)
    clock = _Clock()
    with attach(base.model, prefix):
        generate_ids(base, rows, settings, seed=0, places=[0], ends=False, streamer=clock)
    return [after - before for before, after in pairwise(clock.times[1:])]


class _Clock(BaseStreamer):
    """Notes when it is handed the prompt, and each token after it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        value.cpu()  # where a GPU is behind, wait for it
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to close."""
