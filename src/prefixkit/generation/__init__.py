"""Text in, text out: sampling continuations from a base model, with a prefix or without."""

from prefixkit.generation.decoding import decode
from prefixkit.generation.latency import token_seconds
from prefixkit.generation.prompts import check_length, encode_prompts
from prefixkit.generation.sampling import generate_texts, stream_text

__all__ = ["check_length", "decode", "encode_prompts", "generate_texts", "stream_text", "token_seconds"]
