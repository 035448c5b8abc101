"""A meter of attention mass: adds up what is told of a placement's layers, in columns, and turns sums into means.

Every query falls into a column. Where text is read from left to right that is its own position; where it is read both
ways, and a query's position says nothing of how much it sees, all queries of a reading share one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefixkit.config import Placement
from prefixkit.errors import EvaluationError
from prefixkit.injection.recording import Reading
from prefixkit.prefix import Prefix, SiteStates


@dataclass(frozen=True)
class SiteMass:
    """One attention layer. Its numbers are 0 where it has no virtual tokens.

    Attributes:
        heads: mass per query head, mean over the queries counted.
        uniform: the baseline, mean over the same queries.
        by_length: mass at each of `PlacementMass.lengths`, mean over heads and queries.
        uniform_by_length: the baseline there; under a sliding window it stops falling where the window is full.
        tokens: mass on each virtual token, mean over heads and the queries counted.
        key_norms: length of each virtual token's key, mean over KV heads, in units of the mean text key's.
        value_norms: likewise of values.
    """

    heads: Float[Tensor, "h"]
    uniform: float
    by_length: Float[Tensor, "s"]
    uniform_by_length: Float[Tensor, "s"]
    tokens: Float[Tensor, "p"]
    key_norms: Float[Tensor, "p"]
    value_norms: Float[Tensor, "p"]

    @property
    def mean(self) -> float:
        """Mass, mean over heads and the queries counted."""
        return float(self.heads.mean())


@dataclass(frozen=True)
class PlacementMass:
    """The layers of one placement.

    Attributes:
        placement: which attention they are.
        sites: one entry per layer.
        lengths: of the text in sight. Decoder self-attention: every number of tokens read so far, from 1. Encoder
            self-attention: the lengths texts were cut to. Cross-attention: those of the texts the encoder read.
        texts: how many texts reach each length.
        within: heads, tokens and norms are means over the first `within` tokens of each text.
    """

    placement: Placement
    sites: tuple[SiteMass, ...]
    lengths: tuple[int, ...]
    texts: Int[Tensor, "s"]
    within: int


@dataclass
class _Sums:
    """Of one layer, in float64."""

    mass: Float[Tensor, "h c"]
    uniform: Float[Tensor, "c"]
    tokens: Float[Tensor, "p"]
    norms: Float[Tensor, "2"]  # of text keys, of text values
    calls: int = 0


class Meter:
    """Adds up readings of the layers of one placement; padding does not count.

    Args:
        prefix: what is read.
        placement: whose layers.
        columns: how many.
        means: the columns whose queries heads, tokens and norms are means over.
        curve: the columns that stand for lengths, in their order.
    """

    def __init__(self, prefix: Prefix, placement: Placement, columns: int, *, means: slice, curve: slice) -> None:
        self.prefix, self.placement, self.means, self.curve = prefix, placement, means, curve
        self.sums = {
            index: _Sums(
                mass=torch.zeros(site.query_heads, columns, dtype=torch.float64),
                uniform=torch.zeros(columns, dtype=torch.float64),
                tokens=torch.zeros(prefix.states.lengths[index], dtype=torch.float64),
                norms=torch.zeros(2, dtype=torch.float64),
            )
            for index, site in enumerate(prefix.states.geometry.sites)
            if site.placement is placement
        }  # by index of the site in the geometry
        self.queries = torch.zeros(columns, dtype=torch.long)  # how many fell into each column
        self.keys, self.passes = 0, 0
        self.is_mean = torch.zeros(columns, dtype=torch.long)  # [c]
        self.is_mean[means] = 1

    def begin(self, queries: Int[Tensor, "b t"], keys: Int[Tensor, "b s"], columns: slice | int) -> None:
        """Announce a forward pass.

        Args:
            queries: 1 for those that count; 0 for padding and what is only read.
            keys: 1 for those of text, 0 for padding.
            columns: one per query, and then keys are those of the queries' tokens; or one for all.
        """
        queries, keys = queries.cpu(), keys.cpu()
        self.now = columns
        _add(self.queries, columns, queries.sum(0))
        counted_keys = keys * self.is_mean[columns]  # [b, s]
        self.keys += int(counted_keys.sum())
        self.counted, self.is_text = (queries * self.is_mean[columns]).double(), queries.double()  # [b, t]
        self.counted_keys = counted_keys.double()
        self.passes += 1

    def take(self, reading: Reading) -> None:
        """Add one layer's reading of the pass under way.

        Raises:
            EvaluationError: a weight is not finite.
        """
        sums, shares = self.sums[reading.site], reading.shares.cpu().double()  # [b, h, t, p]
        if not shares.isfinite().all():
            raise EvaluationError(
                f"{self.prefix.states.geometry.sites[reading.site].name}: an attention weight is no finite number: "
                "the artefact is damaged or the dtype too narrow; try model.dtype=float32"
            )
        _add(sums.mass, self.now, torch.einsum("bhtp,bt->ht", shares, self.is_text))
        length = shares.shape[3]
        even = length / (length + reading.visible.cpu().double())  # [b, t]
        _add(sums.uniform, self.now, (even * self.is_text).sum(0))
        sums.tokens += torch.einsum("bhtp,bt->p", shares, self.counted) / shares.shape[1]
        for part, norms in enumerate((reading.key_norms, reading.value_norms)):
            sums.norms[part] += (norms.cpu().double() * self.counted_keys).sum()
        sums.calls += 1

    def result(self, lengths: Sequence[int], texts: Int[Tensor, "s"], within: int) -> PlacementMass:
        """Turn sums into means.

        Args:
            lengths: what the columns of the curve stand for.
            texts: how many texts reach each of them.
            within: tokens of a text that heads, tokens and norms are means over.

        Raises:
            EvaluationError: a layer with virtual tokens was not run exactly once per pass.
        """
        sites = tuple(self._site(index, sums) for index, sums in self.sums.items())
        return PlacementMass(self.placement, sites, tuple(lengths), texts, within)

    def _site(self, index: int, sums: _Sums) -> SiteMass:
        name, states = self.prefix.states.geometry.sites[index].name, self.prefix.states.sites[index]
        if sums.calls != (self.passes if states.length else 0):
            raise EvaluationError(f"{name}: read the prefix {sums.calls} times in {self.passes} forward passes")
        counted = self.queries[self.means].sum()
        text_keys, text_values = sums.norms / self.keys
        return SiteMass(
            heads=sums.mass[:, self.means].sum(1) / counted,
            uniform=float(sums.uniform[self.means].sum() / counted),
            by_length=sums.mass.mean(0)[self.curve] / self.queries[self.curve],
            uniform_by_length=sums.uniform[self.curve] / self.queries[self.curve],
            tokens=sums.tokens / counted,
            key_norms=_norms(states, "key") / text_keys,
            value_norms=_norms(states, "value") / text_values,
        )


def _add(sums: Tensor, columns: slice | int, values: Tensor) -> None:
    """Add `[..., t]` to `[..., c]`, query by query or all to one column."""
    sums[..., columns] += values if isinstance(columns, slice) else values.sum(-1)


def _norms(states: SiteStates, part: str) -> Float[Tensor, "p"]:
    numbers: Tensor = getattr(states, part)  # [g, p, d]
    norms: Tensor = torch.linalg.vector_norm(numbers.cpu().double(), dim=2).mean(0)
    return norms
