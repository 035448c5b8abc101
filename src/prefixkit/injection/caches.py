"""Which prefix a cache was filled under, so that it is not continued under another, or under none.

A cache holds the text's keys and values, and every one of them was computed by a token that read the prefix. Continued
under another prefix, or after `detach`, it would give plausible text that belongs to neither. So each cache that
passes through a model with a prefix is marked; after `detach` the marked ones refuse to grow until the same prefix is
attached again, or until they are emptied.
"""

from typing import Any
from weakref import WeakSet, ref

import torch
from transformers import Cache

from prefixkit.errors import InjectionError
from prefixkit.prefix import Bank

_ATTRIBUTE = "_prefixkit_filled"


class Filled:
    """The mark on one cache.

    Args:
        cache: the cache it stands on.
        token: tells prefixes apart: a bank, or an encoder and how often its weights have changed.
        known: where the caches of the present handle are remembered, without keeping them alive.
    """

    def __init__(self, cache: Cache, token: object, known: "WeakSet[Cache]") -> None:
        self.cache, self.token, self.known = ref(cache), token, known
        known.add(cache)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Filled":
        """A copied cache bears a mark of its own."""
        copied = memo.get(id(self.cache()))
        return self if copied is None else Filled(copied, self.token, self.known)

    def __reduce__(self) -> Any:
        """Refuse to be pickled: what reads the file could not tell which prefix the cache needs.

        Raises:
            InjectionError: always.
        """
        raise InjectionError(
            "past_key_values filled under a prefix cannot be saved; save the prefix and the text instead"
        )

    def refuse(self, *args: Any, **options: Any) -> Any:
        """Stand in for `Cache.update` once the prefix is detached.

        Raises:
            InjectionError: always, unless the cache has been emptied.
        """
        cache = self.cache()
        assert cache is not None
        if int(cache.get_seq_length()) > 0:
            raise InjectionError(
                "past_key_values were filled under a prefix that is no longer attached; attach it again, or start "
                "with an empty cache"
            )
        _unmark(cache)
        return cache.update(*args, **options)


class Caches:
    """The caches that were filled under one handle; they are not kept alive."""

    def __init__(self) -> None:
        self._known: WeakSet[Cache] = WeakSet()

    def enter(self, cache: object, token: object) -> None:
        """Mark a cache that is about to be filled; with None for a token, that is without a prefix, leave it unmarked.

        Raises:
            InjectionError: it holds text read under another prefix, or under none.
        """
        cache = _plain(cache)
        if cache is None:
            return
        filled: Filled | None = getattr(cache, _ATTRIBUTE, None)
        is_filled = int(cache.get_seq_length()) > 0
        if is_filled and not (filled is None and token is None):
            if filled is None:
                raise InjectionError(
                    "past_key_values hold text that was read without this prefix; start with an empty cache"
                )
            if not is_same(filled.token, token):
                raise InjectionError(
                    "past_key_values were filled under another prefix than the one attached; start with an empty cache"
                )
        if token is None:
            _unmark(cache)
        elif not is_filled or filled is None or filled.known is not self._known or "update" in vars(cache):
            _unmark(cache)
            setattr(cache, _ATTRIBUTE, Filled(cache, token, self._known))

    def leave(self, output: Any, token: object) -> None:
        """Mark the cache a forward pass made by itself, if it returns one; not without a prefix (None for a token)."""
        if token is None:
            return
        parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
        for part in parts:
            cache = _plain(part)
            if cache is not None and not hasattr(cache, _ATTRIBUTE):
                setattr(cache, _ATTRIBUTE, Filled(cache, token, self._known))

    def close(self) -> None:
        """Let none of them grow without its prefix."""
        for cache in list(self._known):
            filled = getattr(cache, _ATTRIBUTE, None)
            if filled is not None:
                setattr(cache, "update", filled.refuse)  # noqa: B010 - an instance attribute that shadows the method


def _plain(cache: object) -> Cache | None:
    """The cache that holds the decoder's own text."""
    cache = getattr(cache, "self_attention_cache", cache)
    return cache if isinstance(cache, Cache) else None


def _unmark(cache: Cache) -> None:
    vars(cache).pop("update", None)
    vars(cache).pop(_ATTRIBUTE, None)


def is_same(one: object, other: object) -> bool:
    """Whether two tokens speak of the same prefixes; banks are compared by their numbers."""
    if one is other or not (isinstance(one, Bank) and isinstance(other, Bank)):
        return one is other or (type(one) is type(other) is tuple and one == other)
    if not torch.equal(one.offsets, other.offsets):
        return False
    pairs = [(getattr(a, part), getattr(b, part)) for a, b in zip(one.sites, other.sites, strict=True)
             for part in ("key", "value", "mask", "gate")]  # fmt: skip
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
