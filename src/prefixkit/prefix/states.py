"""Prefix states: the keys and values themselves, as every layer's attention sees them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prefixkit.errors import InjectionError
from prefixkit.prefix.geometry import Geometry


@dataclass(frozen=True, eq=False)
class SiteStates:
    """Keys and values of one site.

    Attributes:
        key: after rotary embedding, that is, as the attention multiplies it with queries.
        value: as the attention sums it.
        gate: share of the prefixed attention in the result, per query head; None means 1 (no gate).
    """

    key: Float[Tensor, "g p d"]
    value: Float[Tensor, "g p d"]
    gate: Float[Tensor, "h"] | None = None

    @property
    def length(self) -> int:
        """Number of virtual tokens here."""
        return self.key.shape[1]

    def __getstate__(self) -> dict[str, Tensor | None]:
        """Pickle the site's own numbers alone: those of a loaded prefix lie in one block with all other sites'."""
        return {name: _on_its_own(part) for name, part in vars(self).items()}


@dataclass(frozen=True, eq=False)
class PrefixStates:
    """Keys and values of every site of a model; lengths may differ from site to site and may be 0."""

    geometry: Geometry
    sites: tuple[SiteStates, ...]

    def __post_init__(self) -> None:
        if len(self.sites) != len(self.geometry.sites):
            raise InjectionError(
                f"prefix states for {len(self.sites)} sites do not fit a geometry of {len(self.geometry.sites)}"
            )
        for site, states in zip(self.geometry.sites, self.sites, strict=True):
            expected = (site.kv_heads, states.length, site.head_dim)
            for part, tensor in (("key", states.key), ("value", states.value)):
                if tuple(tensor.shape) != expected:
                    raise InjectionError(
                        f"{site.name}.{part}: expected shape {list(expected)}, got {list(tensor.shape)}"
                    )
            if states.gate is not None and states.gate.shape != (site.query_heads,):
                raise InjectionError(
                    f"{site.name}.gate: expected shape [{site.query_heads}], got {list(states.gate.shape)}"
                )

    def __repr__(self) -> str:
        return f"PrefixStates({self.num_virtual_tokens} virtual tokens at {len(self.sites)} sites)"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of virtual tokens per site."""
        return tuple(states.length for states in self.sites)

    @property
    def num_virtual_tokens(self) -> int:
        """The longest site's length."""
        return max(self.lengths)

    @property
    def flops_per_token(self) -> int:
        """Operations that attending to the virtual tokens adds to each token of text; a gate's second attention not."""
        sites = zip(self.geometry.sites, self.sites, strict=True)
        return sum(4 * site.query_heads * site.head_dim * own.length for site, own in sites)

    @property
    def num_parameters(self) -> int:
        """Numbers it holds, gates included."""
        gates = sum(own.gate.numel() for own in self.sites if own.gate is not None)
        return self.geometry.num_parameters(self.lengths) + gates

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values, in bytes."""
        return sum(own.key.nbytes + own.value.nbytes for own in self.sites)

    @property
    def has_gate(self) -> bool:
        """Whether any site is gated."""
        return any(states.gate is not None for states in self.sites)

    @classmethod
    def empty(cls, geometry: Geometry) -> "PrefixStates":
        """Return states without a virtual token anywhere."""
        sites = (torch.zeros(site.kv_heads, 0, site.head_dim) for site in geometry.sites)
        return cls(geometry, tuple(SiteStates(none, none) for none in sites))

    @classmethod
    def from_rows(cls, geometry: Geometry, rows: Float[Tensor, "p o"]) -> "PrefixStates":
        """Return states of one length at every site, from rows laid out as `to_rows` does."""
        parts = rows.split([site.numbers_per_token for site in geometry.sites], dim=1)
        pairs = [
            part.reshape(len(rows), 2, site.kv_heads, site.head_dim).permute(1, 2, 0, 3).contiguous()  # [2, g, p, d]
            for part, site in zip(parts, geometry.sites, strict=True)
        ]
        return cls(geometry, tuple(SiteStates(pair[0], pair[1]) for pair in pairs))

    def to_rows(self) -> Float[Tensor, "p o"]:
        """Lay out the states as the paper's matrix ``P``: one row per virtual token, empty sites and gates left out.

        Within a row: the first site's key, head by head, its value, the next site's key, ... An encoder's MLP puts its
        output out in this order, and PEFT's files hold it.
        """
        parts = [
            torch.stack([s.key, s.value]).permute(2, 0, 1, 3).flatten(1) for s in self.sites if s.length
        ]  # [p, 2gd]
        return torch.cat(parts, dim=1)

    def equals(self, other: "PrefixStates") -> bool:
        """Whether both hold the same numbers at the same sites."""
        if self.geometry != other.geometry or self.lengths != other.lengths:
            return False
        pairs = [(getattr(a, part), getattr(b, part)) for a, b in zip(self.sites, other.sites, strict=True)
                 for part in ("key", "value", "gate")]  # fmt: skip
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    def map(self, change: Callable[[Tensor], Tensor]) -> "PrefixStates":
        """Return states with `change` applied to every tensor."""
        return PrefixStates(
            self.geometry,
            tuple(
                SiteStates(change(s.key), change(s.value), None if s.gate is None else change(s.gate))
                for s in self.sites
            ),
        )

    def detach(self) -> "PrefixStates":
        """Return copies that no gradient reaches and no training step changes."""
        return self.map(lambda tensor: tensor.detach().clone())

    def slice(self, lengths: tuple[int, ...]) -> "PrefixStates":
        """Return the first `lengths[i]` virtual tokens of each site.

        A site with too few is repeated from its start; an empty one is filled with zeros.
        """

        def take(tensor: Float[Tensor, "g s d"], length: int) -> Float[Tensor, "g p d"]:
            if tensor.shape[1] == 0:
                return tensor.new_zeros(tensor.shape[0], length, tensor.shape[2])
            return tensor[:, torch.arange(length, device=tensor.device) % tensor.shape[1]]

        return PrefixStates(
            self.geometry,
            tuple(
                SiteStates(take(s.key, p), take(s.value, p), s.gate) for s, p in zip(self.sites, lengths, strict=True)
            ),
        )


def _on_its_own(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or tensor.requires_grad or tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone()
