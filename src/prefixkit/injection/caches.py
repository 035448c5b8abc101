"""Which prefix a cache was filled under, so that it is not continued under another, or under none.

A cache holds the text's keys and values, and every one of them was computed by a token that read the prefix. Continued
under another prefix, or after `detach`, it would give plausible text that belongs to neither. So each layer of a cache
that passes through a model with a prefix is marked; after `detach` the marked ones refuse to grow until the same
prefix is attached again, or until they are emptied. A mark goes where its layer goes, into a copy of the cache or into
another cache, and keeps up with rows that are put into another order, chosen or repeated.

An encoder-decoder's cache is two: of the decoder's own text, and of what its cross-attention reads of the encoder's.
The second is written once, and belongs to the prefix if that has virtual tokens in the encoder. Taken out of the pair
and put into a fresh one, it is refused under another prefix; after `detach` nobody looks, as with `encoder_outputs`.

What a mark cannot tell: tensors taken out of one cache by hand and put into another, as `DynamicCache(list(cache))`
does; and what happens to a single layer that `copy.copy` made before it passes through the model.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor
from transformers import Cache

from prefixkit.errors import InjectionError
from prefixkit.prefix import Bank

_ATTRIBUTE = "_prefixkit_filled"
#: Methods of a layer that move its rows.
_MOVES = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")


@dataclass(frozen=True, eq=False)
class Read:
    """What the rows of a batch read.

    Attributes:
        bank: the prefixes.
        entries: which of them each row reads; None where there is one, for however many rows.
    """

    bank: Bank
    entries: tuple[int, ...] | None = None

    def is_same(self, other: "Read | None") -> bool:
        """Whether each row reads the same entry of one bank here and there."""
        return other is not None and self.bank is other.bank and self.entries == other.entries

    def is_like(self, other: "Read | None") -> bool:
        """Whether each row reads the same numbers here and there."""
        return other is not None and (self.is_same(other) or self.row_by_row().equals(other.row_by_row()))

    def row_by_row(self) -> Bank:
        """Return the bank with one entry per row, or the one for all."""
        if self.entries in (None, tuple(range(len(self.bank)))):
            return self.bank
        return self.bank.rows(torch.tensor(self.entries))


class Mark:
    """The mark on one layer of a cache.

    Args:
        layer: of the cache; not kept alive.
        read: what its rows were computed under.
        known: where the layers filled under the present handle are remembered, without keeping them alive.
        beside: the layer of the encoder's keys and values that goes with it, if that belongs to the prefix too.
    """

    def __init__(self, layer: Any, read: Read, known: "WeakSet[Any]", beside: Any = None) -> None:
        self.layer, self.read, self.known = ref(layer), read, known
        self.beside = None if beside is None else ref(beside)
        self._own: dict[str, Any] = {}
        known.add(layer)
        setattr(layer, _ATTRIBUTE, self)
        if read.entries is not None:
            for move in _MOVES:
                if hasattr(type(layer), move):
                    self._shadow(move, getattr(self, move))

    def remove(self) -> None:
        """Take the mark off, and what it put in front of the layer's methods."""
        layer = self.layer()
        for name, own in self._own.items():
            vars(layer).pop(name, None)
            if own is not None:
                setattr(layer, name, own)
        vars(layer).pop(_ATTRIBUTE, None)

    def _shadow(self, name: str, method: Callable[..., Any]) -> None:
        """Put an instance attribute in front of a method, or of what a caller has put there already."""
        layer = self.layer()
        self._own[name] = vars(layer).get(name)
        setattr(layer, name, method)

    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        """Call what stands behind such an attribute."""
        layer, own = self.layer(), self._own[name]
        return getattr(type(layer), name)(layer, *args, **options) if own is None else own(*args, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Mark":
        """A copied layer bears a mark of its own."""
        copied = memo.get(id(self.layer()))
        beside = None if self.beside is None else copy.deepcopy(self.beside(), memo)
        if copied is None:
            return self
        mark = Mark(copied, self.read, self.known, beside)
        if "update" in self._own:
            mark.close()
        return mark

    def __reduce__(self) -> Any:
        """Refuse to be pickled: what reads the file could not tell which prefix the cache needs.

        Raises:
            InjectionError: always.
        """
        raise InjectionError(
            "past_key_values filled under a prefix cannot be saved; save the prefix and the text instead"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Stand in for the layer's: let each row take the place of another."""
        self._move("reorder_cache", beam_idx, lambda entries: entries[beam_idx.cpu()])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Stand in for the layer's: keep some of the rows."""
        self._move("batch_select_indices", indices, lambda entries: entries[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Stand in for the layer's: repeat each row."""
        self._move("batch_repeat_interleave", repeats, lambda entries: entries.repeat_interleave(repeats))

    def _move(self, name: str, how: Any, move: Callable[[Tensor], Tensor]) -> None:
        self._call(name, how)
        entries = move(torch.tensor(self.read.entries))
        self.read = Read(self.read.bank, tuple(entries.tolist()))

    def stands_for(self, read: Read | None, known: "WeakSet[Any]") -> bool:
        """Whether a mark of this reading, made under this handle, would be no other."""
        return self.read.is_same(read) and self.known is known and "update" not in self._own

    def close(self) -> None:
        """Let the layer grow no more."""
        if "update" not in self._own:
            self._shadow("update", self.refuse)

    def refuse(self, *args: Any, **options: Any) -> Any:
        """Stand in for the layer's `update` once the prefix is detached.

        Raises:
            InjectionError: always, unless the layer has been emptied.
        """
        layer, beside = self.layer(), None if self.beside is None else self.beside()
        if any(each is not None and _is_filled(each) for each in (layer, beside)):
            raise InjectionError(
                "past_key_values were filled under a prefix that is no longer attached; attach it again, or start "
                "with an empty cache"
            )
        self.remove()
        return layer.update(*args, **options)  # type: ignore[union-attr]  # it is calling


class Caches:
    """The layers of caches that were filled under one handle; they are not kept alive."""

    def __init__(self) -> None:
        self._known: WeakSet[Any] = WeakSet()

    def enter(self, cache: object, own: Read | None, encoded: Read | None) -> None:
        """Mark a cache that is about to be filled; one that reads no prefix is left unmarked.

        Args:
            cache: what the stack was given.
            own: what its rows are about to read.
            encoded: the same, or None if none of its virtual tokens are in the encoder.

        Raises:
            InjectionError: it holds text read under another prefix, or under none.
        """
        layers = list(_layers(cache, own, encoded))
        _check([(layer, read) for layer, read, _ in layers])
        for layer, read, beside in layers:
            mark = _mark_of(layer)
            if mark is None or not mark.stands_for(read, self._known):
                if mark is not None:
                    mark.remove()
                if read is not None:
                    Mark(layer, read, self._known, beside)

    def leave(self, output: Any, reads: Callable[[], tuple[Read | None, Read | None]], given: object = None) -> None:
        """Mark the layers that a forward pass, or `generate`, made by itself; not without a prefix.

        Args:
            output: what was returned; caches may stand in it at any depth.
            reads: gives what `enter` takes; asked only if there is a layer to mark.
            given: a cache of the caller's; it was marked when a forward pass went on from it, or holds nothing of it.
        """
        for cache in _caches_in(output):
            if cache is not given and any(not hasattr(layer, _ATTRIBUTE) for layer, *_ in _layers(cache, None, None)):
                for layer, read, beside in _layers(cache, *reads()):
                    if read is not None and not hasattr(layer, _ATTRIBUTE):
                        Mark(layer, read, self._known, beside)

    def close(self) -> None:
        """Let none of them grow without its prefix."""
        for layer in list(self._known):
            mark = _mark_of(layer)
            if mark is not None:
                mark.close()


def _caches_in(output: Any) -> Iterator[Cache]:
    """Yield the caches in what a forward pass or `generate` returned."""
    if isinstance(output, Cache):
        yield output
    elif isinstance(output, dict | list | tuple):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _caches_in(part)


def _layers(cache: object, own: Read | None, encoded: Read | None) -> Iterator[tuple[Any, Read | None, Any]]:
    """Yield a cache's layers that hold keys, each with what it was read under, and the encoder's beside it."""
    cross = getattr(cache, "cross_attention_cache", None)
    text = getattr(cache, "self_attention_cache", cache)
    beside = list(cross.layers) if isinstance(cross, Cache) else []
    for layer in beside:
        yield layer, encoded, None
    if isinstance(text, Cache):
        for index, layer in enumerate(text.layers):
            if hasattr(layer, "get_seq_length"):
                yield layer, own, beside[index] if encoded is not None and index < len(beside) else None


def _check(layers: list[tuple[Any, Read | None]]) -> None:
    """Refuse layers that hold what was read otherwise; what many layers have in common is compared once."""
    agreed: set[tuple[int, object, int]] = set()
    for layer, read in layers:
        mark = _mark_of(layer)
        if mark is None:
            if read is not None and _is_filled(layer):
                raise _refusal("hold text that was read without this prefix;")
            continue
        was, pair = mark.read, (id(mark.read.bank), mark.read.entries, id(read))
        if was.is_same(read) or pair in agreed or not _is_filled(layer):
            continue
        if not was.is_like(read):
            if read is not None and was.bank.equals(read.bank):
                raise _refusal("hold their rows in another order than the prefixes; attach those in the same order, or")
            raise _refusal("were filled under another prefix than the one attached;")
        agreed.add(pair)


def _refusal(why: str) -> InjectionError:
    return InjectionError(f"past_key_values {why} start with an empty cache")


def _is_filled(layer: Any) -> bool:
    return int(layer.get_seq_length()) > 0


def _mark_of(layer: Any) -> Mark | None:
    """Return a layer's mark; a layer that `copy.copy` made has that of another, and gets one of its own."""
    mark: Mark | None = getattr(layer, _ATTRIBUTE, None)
    if mark is None:
        return None
    if mark.layer() is layer:
        return mark
    read, known = mark.read, mark.known
    for name, value in list(vars(layer).items()):
        if getattr(value, "__self__", None) is mark:
            del vars(layer)[name]
    return Mark(layer, read, known)
