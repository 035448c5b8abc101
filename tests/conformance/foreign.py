"""Caches that were filled under another prefix than the one that reads on, and how each is refused."""

from collections.abc import Sequence

from prefixkit.prefix import Prefix

_UNDER_ANOTHER = "filled under another prefix than the one attached; start with an empty cache"
FOREIGN = {
    "filled without": "hold text that was read without this prefix; start with an empty cache",
    "filled under another": _UNDER_ANOTHER,
    "left by its prefix": "filled under a prefix that is no longer attached; attach it again",
}
#: Of an encoder-decoder's two caches, the one that holds the encoder's part.
FOREIGN_PAIRS = FOREIGN | {"another's encoder": _UNDER_ANOTHER}


def before_and_after(filled: str, rows: Sequence[Prefix | None]) -> tuple[Prefix | None, Prefix | None]:
    """What the cache is filled under, and what is attached when it is read on."""
    first, _, second = rows
    return {"filled without": (None, first), "left by its prefix": (first, None)}.get(filled, (second, first))
