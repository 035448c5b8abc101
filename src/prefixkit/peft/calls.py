"""The calls of a base model through its `PeftModel`s that are under way, in whatever thread.

A prefix is attached when the first call begins and gone when the last one ends. Calls that overlap, of several threads
or one made inside another, must read the same, since what a model has attached it has attached for all; any other is
refused, and so is the base model itself called by a thread that is in no such call. Nothing waits: a call inside a
callback of another would wait for ever.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import RLock, Thread, get_ident
from time import sleep
from weakref import WeakKeyDictionary, WeakSet, finalize

import torch
from torch import nn
from transformers import PreTrainedModel

from prefixkit.errors import InjectionError
from prefixkit.injection import Handle, attach
from prefixkit.prefix import Prefix, PrefixEncoder, PrefixStates

_known: WeakKeyDictionary[PreTrainedModel, "Calls"] = WeakKeyDictionary()
_creating = RLock()
_PAUSE = 0.05
"""Seconds between two attempts to take off what a model left that is gone."""


def calls_of(base: PreTrainedModel) -> "Calls":
    """Return the calls of a base model, which all its `PeftModel`s share."""
    with _creating:
        return _known.setdefault(base, Calls())


@dataclass(frozen=True, eq=False)
class Wanted:
    """What a call is to read.

    Attributes:
        prefix: an encoder, a prefix, or nothing.
        position_offset: for an encoder, the position of the first text token; None for its own.
    """

    prefix: PrefixEncoder | Prefix | None
    position_offset: int | None = None

    def is_met_by(self, other: "Wanted") -> bool:
        """Whether a call that wants this may read what another reads."""
        if self.prefix is None or other.prefix is None or self.prefix is other.prefix:
            return self.prefix is other.prefix and self.position_offset == other.position_offset
        if isinstance(other.prefix, PrefixEncoder) or (isinstance(self.prefix, nn.Module) and torch.is_grad_enabled()):
            return False  # it may change while it is read, or would get no gradient
        (mine, position), (theirs, other_position) = self._numbers(), other._numbers()
        return position == other_position and mine.geometry == theirs.geometry and mine.equals(theirs)

    def _numbers(self) -> tuple[PrefixStates, int]:
        prefix = self.prefix
        assert prefix is not None
        if isinstance(prefix, Prefix):
            return prefix.states, prefix.position_offset
        return prefix.materialise(), prefix.text_position(self.position_offset)


class Calls:
    """Those of one base model, which is plain while there are none."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._depths: dict[int, int] = {}  # of calls within calls, by thread
        self._wanted = Wanted(None)
        self._handle: Handle | None = None
        self._owners: WeakSet[nn.Module] = WeakSet()

    @contextmanager
    def reading(self, owner: nn.Module, base: PreTrainedModel, wanted: Wanted) -> Iterator[None]:
        """Let the base model read a prefix in the calling thread.

        Args:
            owner: the `PeftModel`; when the last one is gone, nothing stays attached.
            base: the base model.
            wanted: what to read.

        Raises:
            InjectionError: a call that reads something else is under way.
        """
        me = get_ident()
        with self._lock:
            if not self._depths:
                self._begin(owner, base, wanted)
            elif not wanted.is_met_by(self._wanted):
                raise self._busy()
            self._depths[me] = self._depths.get(me, 0) + 1  # from here on the guard lets this thread in
        try:
            yield
        finally:
            with self._lock:
                depth = self._depths.pop(me) - 1
                if depth:
                    self._depths[me] = depth
                if not self._depths:
                    self._end(base)

    def detach(self, *, wait: bool = True) -> None:
        """Leave nothing attached.

        Args:
            wait: for other threads that are beginning or ending a call, attaching or detaching.

        Raises:
            InjectionError: a call is under way, or there is something to wait for.
        """
        if not self._lock.acquire(blocking=wait):
            raise self._busy()
        try:
            if self._depths:
                raise self._busy()
            if self._handle is not None:
                self._handle.detach(wait=wait)
                self._handle = None
        finally:
            self._lock.release()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # bookkeeping, no arithmetic worth a graph
    def _begin(self, owner: nn.Module, base: PreTrainedModel, wanted: Wanted) -> None:
        if owner not in self._owners:
            self._owners.add(owner)
            finalize(owner, self._forget)  # the base model may outlive it
        offset = wanted.position_offset
        if self._handle is not None:
            self._handle.switch(wanted.prefix, position_offset=offset)
        elif wanted.prefix is not None:
            self._handle = attach(base, wanted.prefix, position_offset=offset, guard=self._refuse_others)
        self._wanted = wanted

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, base: PreTrainedModel) -> None:
        self._wanted = Wanted(None)
        if self._handle is not None:
            self._handle.rest()
            if not base.is_activation_checkpointing:  # its layers may run again, in a backward pass
                with suppress(InjectionError):  # a thread that is being refused is still in: the next call takes it off
                    self._handle.detach()
                    self._handle = None

    def _forget(self) -> None:
        """Take off what the last owner left, in whatever thread collects garbage: it may hold any lock, so wait not."""
        if any(True for _ in self._owners):
            return
        try:
            self.detach(wait=False)
        except InjectionError:
            Thread(target=self._detach_when_free, daemon=True).start()

    def _detach_when_free(self) -> None:
        """Wait in a thread that holds nothing until no other attaches, detaches or runs the base model."""
        while not any(True for _ in self._owners):
            with suppress(InjectionError):
                return self.detach()
            sleep(_PAUSE)

    def _refuse_others(self) -> None:
        if get_ident() not in self._depths:
            raise InjectionError(
                "another thread is running this base model with a prefix; join it first, or call a copy of the model"
            )

    def _busy(self) -> InjectionError:
        if get_ident() in self._depths:
            return InjectionError(
                "this call is made inside another call of this model, which reads something else; make it afterwards"
            )
        return InjectionError(
            "another thread is running this model, and reads something else (another prefix, the same at another step, "
            "or none); join it first, or give each thread a copy of the model"
        )
