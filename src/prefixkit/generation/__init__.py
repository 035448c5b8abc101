"""Text in, text out: sampling continuations from a base model, with a prefix or without."""

from prefixkit.generation.prompts import check_length, encode_prompts
from prefixkit.generation.sampling import decode, generate_texts, stream_text

__all__ = ["check_length", "decode", "encode_prompts", "generate_texts", "stream_text"]
