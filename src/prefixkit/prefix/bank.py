"""The bank: the prefixes of one batch, stored once, and which row sees which.

Prefixes of different lengths are padded to the longest and masked, site by site; rows without a prefix see
only masked columns. What is stored is `n` distinct prefixes, however many rows share them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from operator import attrgetter

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from prefixkit.errors import InjectionError
from prefixkit.prefix.states import PrefixStates, SiteStates


@dataclass(frozen=True, eq=False)
class SiteBank:
    """What one site prepends for a batch.

    Attributes:
        key: of each distinct prefix; read by a layer, one for all rows (n = 1) or one per row (n = b).
        value: likewise.
        mask: which columns each entry, or each token of it, may see; None where all may see all.
        gate: per query head; None where no entry is gated.
    """

    key: Float[Tensor, "n g p d"]
    value: Float[Tensor, "n g p d"]
    mask: Bool[Tensor, "n p"] | Bool[Tensor, "b t p"] | None
    gate: Float[Tensor, "n h"] | None

    @property
    def length(self) -> int:
        """Columns prepended here."""
        return self.key.shape[2]

    def rows(self, index: Int[Tensor, "b"]) -> "SiteBank":
        """Return the entries of each row of a batch; a single entry is shared, several are copied."""
        index = index.to(self.key.device)
        mask, gate = (None if part is None else _chosen(part, index) for part in (self.mask, self.gate))
        return SiteBank(_chosen(self.key, index), _chosen(self.value, index), mask, gate)

    def to(self, device: torch.device, dtype: torch.dtype) -> "SiteBank":
        """Return the bank on a device, its numbers in a dtype; what rows share is moved once."""
        return SiteBank(
            _moved(self.key, device, dtype),
            _moved(self.value, device, dtype),
            None if self.mask is None else self.mask.to(device),
            None if self.gate is None else _moved(self.gate, device, dtype),
        )

    def seen_by(self, tokens: Bool[Tensor, "b t"]) -> "SiteBank":
        """Return the bank with its columns visible to some of a text's tokens alone."""
        own = torch.ones_like(self.key[:, 0, :, 0], dtype=torch.bool) if self.mask is None else self.mask  # [n, p]
        return replace(self, mask=own[:, None, :] & tokens[:, :, None].to(own.device))

    def padded(self, length: int) -> "SiteBank":
        """Return the bank widened to so many columns; those added are zero, and masked."""
        columns = length - self.length
        seen = torch.ones_like(self.key[:, 0, :, 0], dtype=torch.bool) if self.mask is None else self.mask
        return SiteBank(
            functional.pad(self.key, (0, 0, 0, columns)),
            functional.pad(self.value, (0, 0, 0, columns)),
            functional.pad(seen, (0, columns)),
            self.gate,
        )

    def equals(self, other: "SiteBank") -> bool:
        """Whether each row reads the same numbers in both, whatever they are padded to."""
        length = max(self.length, other.length)
        one, two = self.padded(length), other.padded(length)
        pairs = [(one.key, two.key), (one.value, two.value), (one.mask, two.mask), (one.gate, two.gate)]
        return all(_are_equal(a, b) for a, b in pairs)

    def detach(self) -> "SiteBank":
        """Return the bank without the way its numbers came about."""
        return SiteBank(
            self.key.detach(), self.value.detach(), self.mask, None if self.gate is None else self.gate.detach()
        )


@dataclass(frozen=True, eq=False)
class Bank:
    """Several prefixes stacked, ready to be prepended.

    Attributes:
        entries: one `SiteBank` per site of the geometry.
        entry_offsets: position of the first text token under each entry.
        beside: tells what else is changed in the model from other changes of it; the same for all rows.
        index: the entry of each row of a batch; None where there is one for all rows, or row i has entry i.
    """

    entries: tuple[SiteBank, ...]
    entry_offsets: Int[Tensor, "n"]
    beside: object = ()
    index: Int[Tensor, "b"] | None = None

    def __len__(self) -> int:
        """Number of rows, or 1 where one entry is for all rows."""
        return len(self.entry_offsets if self.index is None else self.index)

    @property
    def offsets(self) -> Int[Tensor, "b"]:
        """Position of the first text token in each row."""
        return self.entry_offsets if self.index is None else self.entry_offsets[self.index]

    def site(self, number: int) -> SiteBank:
        """Return what a site prepends, row by row."""
        entries = self.entries[number]
        return entries if self.index is None else entries.rows(self.index)

    def rows(self, index: Int[Tensor, "b"]) -> "Bank":
        """Return a bank for the rows of another batch, given the row of this one that each of them is like."""
        return replace(self, index=index if self.index is None else self.index[index])

    def seen_by(self, tokens: Bool[Tensor, "b t"]) -> "Bank":
        """Return a bank that some of a text's tokens alone may see."""
        if tokens.all():
            return self
        sites = tuple(self.site(number).seen_by(tokens) for number in range(len(self.entries)))
        return Bank(sites, self.offsets, self.beside)

    def equals(self, other: "Bank") -> bool:
        """Whether each row reads the same in both: an entry of its own, or one that speaks for all rows."""
        if self.beside != other.beside or not _are_equal(self.offsets, other.offsets):
            return False
        numbers = range(max(len(self.entries), len(other.entries)))
        return all(self.site(number).equals(other.site(number)) for number in numbers)

    def detach(self) -> "Bank":
        """Return the bank without the way its numbers came about."""
        return replace(self, entries=tuple(site.detach() for site in self.entries))


def stack(prefixes: Sequence[PrefixStates | None], offsets: Sequence[int], beside: object = ()) -> Bank:
    """Stack prefixes into a bank.

    Args:
        prefixes: states of one geometry; None for rows without a prefix. At least one must be states.
        offsets: position of the first text token, one per entry.
        beside: `Bank.beside`.

    Raises:
        InjectionError: the prefixes belong to models of different geometry, or there is none.
    """
    present = [prefix for prefix in prefixes if prefix is not None]
    if not present:
        raise InjectionError("a bank needs at least one prefix")
    geometry = present[0].geometry
    if any(prefix.geometry != geometry for prefix in present):
        raise InjectionError("prefixes of models with different geometry cannot share a batch")
    if len(prefixes) == 1:
        return Bank(_copied(present[0]), torch.tensor(list(offsets), dtype=torch.long), beside)
    sites = tuple(
        _stack_site([None if prefix is None else prefix.sites[i] for prefix in prefixes])
        for i in range(len(geometry.sites))
    )
    return Bank(sites, torch.tensor(list(offsets), dtype=torch.long), beside)


def _copied(prefix: PrefixStates) -> tuple[SiteBank, ...]:
    """Return the sites of one prefix for all rows, copied, so that they stay what they are; in one go if possible."""
    states = [tensor for site in prefix.sites for tensor in (site.key, site.value)]
    if len({*map(attrgetter("shape", "dtype", "device"), states)}) == 1:
        copies = torch.stack(states).unsqueeze(1).unbind()
    else:
        copies = tuple(tensor[None].clone() for tensor in states)
    gates = (None if site.gate is None else site.gate[None].clone() for site in prefix.sites)
    return tuple(map(SiteBank, copies[::2], copies[1::2], repeat(None), gates))


def _chosen(part: Tensor, index: Int[Tensor, "b"]) -> Tensor:
    return part[index] if len(part) > 1 else part.expand(len(index), *part.shape[1:])


def _moved(part: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    is_shared = len(part) > 1 and part.stride(0) == 0
    return part[:1].to(device, dtype).expand_as(part) if is_shared else part.to(device, dtype)


def _stack_site(entries: Sequence[SiteStates | None]) -> SiteBank:
    lengths = [0 if entry is None else entry.length for entry in entries]
    longest = max(lengths)
    some = next(entry for entry in entries if entry is not None)
    nothing = some.key[:, :0]

    def padded(part: str) -> Float[Tensor, "n g p d"]:
        tensors = [nothing if entry is None else getattr(entry, part) for entry in entries]
        if min(lengths) < longest:
            tensors = [functional.pad(tensor, (0, 0, 0, longest - tensor.shape[1])) for tensor in tensors]
        return torch.stack(tensors)

    mask = None
    if min(lengths) < longest:
        columns = torch.arange(longest, device=some.key.device)
        mask = columns < torch.tensor(lengths, device=some.key.device)[:, None]  # [n, p]
    gate = None
    gates = [None if entry is None else entry.gate for entry in entries]
    known = next((g for g in gates if g is not None), None)
    if known is not None:
        gate = torch.stack([torch.ones_like(known) if g is None else g for g in gates])  # [n, h]
    return SiteBank(padded("key"), padded("value"), mask, gate)


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Compare row by row; no gate at all is one that is wide open."""
    known = other if one is None else one
    if known is None:
        return True
    one, other = (torch.ones_like(known) if part is None else part for part in (one, other))
    if one.dtype != other.dtype or one.shape[1:] != other.shape[1:]:
        return False
    if len(one) != len(other) and 1 not in (len(one), len(other)):
        return False
    return bool((one == other.to(one.device)).all())
