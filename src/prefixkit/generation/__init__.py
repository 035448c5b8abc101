"""Text in, text out: sampling continuations from a base model, with a prefix or without."""

from prefixkit.generation.sampling import decode, generate_texts, stream_text

__all__ = ["decode", "generate_texts", "stream_text"]
