"""Text in, text out: sampling continuations from a base model, with a prefix or without."""

from prefixkit.generation.sampling import generate_texts, stream_text

__all__ = ["generate_texts", "stream_text"]
