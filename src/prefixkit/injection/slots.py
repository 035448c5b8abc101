"""Slots: the link from an attention layer to the prefix it reads.

A slot sits on the attention module itself, so that it follows the module wherever the module goes, and holds
the site's share of what is attached. The bank of the present forward pass is set by `attach`'s hook before the
first layer runs. It also travels as a keyword argument (`BANK`) through the layers, because gradient checkpointing
runs a layer again with the arguments of its own forward pass, when the present one may be another.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from threading import enumerate as enumerate_threads
from threading import get_ident
from weakref import WeakSet

from jaxtyping import Float
from torch import Tensor, nn

from prefixkit.compat import is_in_backward
from prefixkit.errors import InjectionError
from prefixkit.prefix import Bank, SiteBank, SiteStates

#: The keyword under which a forward pass hands its bank down to its attention layers.
BANK = "prefixkit_bank"
_ATTRIBUTE = "_prefixkit_slot"
#: Modules of models with a prefix that are no part of what reads it, such as those that see images.
_outside: WeakSet[nn.Module] = WeakSet()


class Current:
    """The bank of the present forward pass, shared by all slots of a model; every thread has a forward pass of its own.

    Args:
        bank: of the calling thread.
    """

    def __init__(self, bank: Bank | None = None) -> None:
        self._banks: dict[int, Bank | None] = {get_ident(): bank}
        self._kept: dict[int, dict[int, SiteStates]] = {}

    @contextmanager
    def keeping(self) -> Iterator[dict[int, SiteStates]]:
        """Let the slots keep the keys and values that the calling thread's forward passes compute, by site."""
        kept = self._kept[get_ident()] = {}
        try:
            yield kept
        finally:
            del self._kept[get_ident()]

    @property
    def kept(self) -> dict[int, SiteStates] | None:
        """What is being kept for the calling thread; None if nothing is."""
        return self._kept.get(get_ident())

    @property
    def bank(self) -> Bank | None:
        """The calling thread's bank; None between forward passes of a model that never ran in it."""
        return self._banks.get(get_ident())

    @bank.setter
    def bank(self, bank: Bank | None) -> None:
        self._banks[get_ident()] = bank

    def clear(self) -> None:
        """Forget the banks of all threads."""
        self._banks.clear()


class Users(AbstractContextManager["Users"]):
    """The threads that are running a model with a prefix, and how deep in calls each is."""

    def __init__(self) -> None:
        self._depths: dict[int, int] = {}

    def enter(self) -> None:
        """The calling thread begins a call."""
        self._depths[get_ident()] = self._depths.get(get_ident(), 0) + 1

    def leave(self) -> None:
        """The calling thread has finished one, well or badly."""
        depth = self._depths.pop(get_ident(), 0) - 1
        if depth > 0:
            self._depths[get_ident()] = depth

    def __enter__(self) -> "Users":
        """Enter."""
        self.enter()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave."""
        self.leave()

    def has_me(self) -> bool:
        """Whether the calling thread is under way."""
        return get_ident() in self._depths

    def has_others(self) -> bool:
        """Whether another living thread than the calling one is under way."""
        living = {thread.ident for thread in enumerate_threads()}
        return any(thread != get_ident() and thread in living for thread in list(self._depths))


@dataclass(frozen=True)
class Slot:
    """One attention layer's view of what is attached.

    Attributes:
        site: index of the layer's site in the geometry.
        is_causal: whether the layer's text hides its own future; if not, a missing mask means that all is visible.
        implementation: the model's own attention, ``"sdpa"`` or ``"eager"``.
        current: the bank of the present forward pass.
    """

    site: int
    is_causal: bool
    implementation: str
    current: Current = field(repr=False)

    def read(self, batch_size: int, own: Bank | None = None) -> SiteBank:
        """Return this site's part of the bank.

        Args:
            batch_size: rows the attention layer got.
            own: the bank of the forward pass the layer belongs to, where the model handed it down.

        Raises:
            InjectionError: no forward pass of the whole model is under way in this thread, or its rows are not these;
                or a layer is run again in the backward pass and has lost its bank.
        """
        bank = self.current.bank if own is None else own
        if own is None and is_in_backward():
            raise InjectionError(
                "gradient checkpointing: this model does not hand keyword arguments down to its attention layers, "
                "so a recomputed layer cannot know its prefix; switch gradient checkpointing off"
            )
        if bank is None:
            raise InjectionError("an attention layer was called on its own; call the whole model inside attach()")
        if len(bank) not in (1, batch_size):
            raise InjectionError(f"prefixes for {len(bank)} rows are attached, the attention layer got {batch_size}")
        return bank.site(self.site)

    def keep(self, key: Float[Tensor, "b g s d"], value: Float[Tensor, "b g s d"]) -> None:
        """Keep what the layer computed for a text of one row, if somebody wants it (`Current.keeping`)."""
        kept = self.current.kept
        if kept is not None:
            kept[self.site] = SiteStates(key[0], value[0])


def place(module: nn.Module, slot: Slot) -> None:
    """Put a slot on an attention layer."""
    setattr(module, _ATTRIBUTE, slot)


def clear(module: nn.Module) -> None:
    """Take the slot off again."""
    delattr(module, _ATTRIBUTE)


def has_slot(module: nn.Module) -> bool:
    """Whether something is attached to this layer."""
    return _ATTRIBUTE in vars(module)


def leave_out(modules: Iterable[nn.Module]) -> None:
    """Remember modules of a model that its prefix is not for, so that the refusal can say so."""
    _outside.update(modules)


def forget(modules: Iterable[nn.Module]) -> None:
    """Remember them no longer."""
    _outside.difference_update(modules)


def slot_of(module: nn.Module) -> Slot:
    """Return the slot of a layer.

    Raises:
        InjectionError: nothing is attached to it.
    """
    slot = getattr(module, _ATTRIBUTE, None)
    if module in _outside:
        raise InjectionError(
            f"{type(module).__name__} is no layer of the text, and a prefix stands before text alone: images and "
            "sound are not supported; leave them out, or detach first"
        )
    if not isinstance(slot, Slot):
        raise InjectionError(
            f"{type(module).__name__} asks for prefixkit's attention but has no prefix; "
            "its configuration was copied from a model while a prefix was attached, or is that model's own; give each "
            "model a configuration of its own"
        )
    return slot
