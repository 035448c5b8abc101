"""Labels for texts and for words, many at once, by a prefix and the head that was trained with it."""

from prefixkit.classification.hidden import hidden_at
from prefixkit.classification.labels import ClassifiedText, TaggedWord, classify, tag

__all__ = ["ClassifiedText", "TaggedWord", "classify", "hidden_at", "tag"]
