"""Which prefix a cache was filled under, so that it is not continued under another, or under none.

A cache holds the text's keys and values, and every one of them was computed by a token that read the prefix. Continued
under another prefix, or after `detach`, it would give plausible text that belongs to neither. So each cache that
passes through a model with a prefix is marked; after `detach` the marked ones refuse to grow until the same prefix is
attached again, or until they are emptied.

An encoder-decoder's cache is two: of the decoder's own text, and of what its cross-attention reads of the encoder's.
The second is written once, and belongs to the prefix if that has virtual tokens in the encoder. Taken out of the pair
and put into a fresh one, it is refused under another prefix; after `detach` nobody looks, as with `encoder_outputs`.

What a mark cannot tell: rows put into another order by hand (`reorder_cache`) while each has a prefix of its own, and
layers moved by hand from a marked cache into a new one. Both are the caller's to keep right.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor
from transformers import Cache

from prefixkit.errors import InjectionError
from prefixkit.prefix import Bank

_ATTRIBUTE = "_prefixkit_filled"


class Filled:
    """The mark on one cache.

    Args:
        cache: the cache it stands on.
        token: tells prefixes apart: a bank.
        known: where the caches of the present handle are remembered, without keeping them alive.
        cross: the cache of the encoder's keys and values that stands beside it, if that belongs to the prefix too.
    """

    def __init__(self, cache: Cache, token: object, known: "WeakSet[Cache]", cross: Cache | None = None) -> None:
        self.cache, self.token, self.known = ref(cache), token, known
        self.cross = None if cross is None else ref(cross)
        known.add(cache)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Filled":
        """A copied cache bears a mark of its own."""
        copied = memo.get(id(self.cache()))
        cross = None if self.cross is None else copy.deepcopy(self.cross(), memo)
        return self if copied is None else Filled(copied, self.token, self.known, cross)

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
        cross = None if self.cross is None else self.cross()
        if any(each is not None and int(each.get_seq_length()) > 0 for each in (cache, cross)):
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

    def enter(self, cache: object, token: object, encoded: object) -> None:
        """Mark a cache that is about to be filled; with None for a token, that is without a prefix, leave it unmarked.

        Args:
            cache: what the stack was given.
            token: of the prefix that is attached.
            encoded: the same, or None if none of its virtual tokens are in the encoder.

        Raises:
            InjectionError: it holds text read under another prefix, or under none.
        """
        parts = list(_parts(cache, token, encoded))
        for part, own in parts:
            _check(part, own)
        for part, own in parts:
            filled: Filled | None = getattr(part, _ATTRIBUTE, None)
            is_filled = int(part.get_seq_length()) > 0
            if own is None:
                _unmark(part)
            elif not is_filled or filled is None or filled.known is not self._known or "update" in vars(part):
                _unmark(part)
                self._mark(part, own, parts)

    def leave(self, output: Any, tokens: Callable[[], tuple[object, object]], given: object = None) -> None:
        """Mark the caches that a forward pass, or `generate`, made by itself and returns; not without a prefix.

        Args:
            output: what was returned; caches may stand in it at any depth.
            tokens: gives what `enter` takes; asked only if there is a cache to mark.
            given: a cache of the caller's; it was marked when a forward pass went on from it, or holds nothing of it.
        """
        for cache in _caches_in(output):
            if cache is given or all(hasattr(part, _ATTRIBUTE) for part, _ in _parts(cache, None, None)):
                continue
            parts = list(_parts(cache, *tokens()))
            for part, own in parts:
                if own is not None and not hasattr(part, _ATTRIBUTE):
                    self._mark(part, own, parts)

    def _mark(self, part: Cache, token: object, parts: list[tuple[Cache, object]]) -> None:
        """Mark one; where it is a decoder's own text, remember the encoder's beside it."""
        cross = next((other for other, own in parts if other is not part and own is not None), None)
        beside = cross if part is parts[-1][0] else None
        setattr(part, _ATTRIBUTE, Filled(part, token, self._known, beside))

    def close(self) -> None:
        """Let none of them grow without its prefix."""
        for cache in list(self._known):
            filled = getattr(cache, _ATTRIBUTE, None)
            if filled is not None:
                setattr(cache, "update", filled.refuse)  # noqa: B010 - an instance attribute that shadows the method


def _caches_in(output: Any) -> Iterator[Cache]:
    """Yield the caches in what a forward pass or `generate` returned."""
    if isinstance(output, Cache):
        yield output
    elif isinstance(output, dict | list | tuple):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _caches_in(part)


def _parts(cache: object, token: object, encoded: object) -> Iterator[tuple[Cache, object]]:
    """Yield the caches that one is made of, each with the token of what it holds; the decoder's own text last."""
    cross = getattr(cache, "cross_attention_cache", None)
    if isinstance(cross, Cache):
        yield cross, encoded
    own = getattr(cache, "self_attention_cache", cache)
    if isinstance(own, Cache):
        yield own, token


def _check(cache: Cache, token: object) -> None:
    filled: Filled | None = getattr(cache, _ATTRIBUTE, None)
    if int(cache.get_seq_length()) == 0 or (filled is None and token is None):
        return
    if filled is None:
        raise InjectionError("past_key_values hold text that was read without this prefix; start with an empty cache")
    if not is_same(filled.token, token):
        raise InjectionError(
            "past_key_values were filled under another prefix than the one attached; start with an empty cache"
        )


def _unmark(cache: Cache) -> None:
    vars(cache).pop("update", None)
    vars(cache).pop(_ATTRIBUTE, None)


def is_same(one: object, other: object) -> bool:
    """Whether two tokens speak of the same prefixes; banks are compared by their numbers."""
    if one is other or not (isinstance(one, Bank) and isinstance(other, Bank)):
        return one is other
    pairs = [(getattr(a, part), getattr(b, part)) for a, b in zip(one.sites, other.sites, strict=True)
             for part in ("key", "value", "mask", "gate")]  # fmt: skip
    return all(_are_equal(a, b) for a, b in [(one.offsets, other.offsets), *pairs])


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is other or one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other.to(one.device))
