"""Geometry: the places of a base model where keys and values can be prepended, and their sizes."""

from collections.abc import Sequence
from dataclasses import dataclass

from prefixkit.config import Placement
from prefixkit.errors import ConfigError


@dataclass(frozen=True)
class Site:
    """One attention layer that can take a prefix.

    Attributes:
        placement: which attention of the model this is.
        layer: index within its stack, from 0.
        query_heads: `h`.
        kv_heads: `g`; smaller than `h` under grouped-query attention.
        head_dim: `d`.
    """

    placement: Placement
    layer: int
    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def name(self) -> str:
        """Name of the site in files, such as ``decoder_self.3``."""
        return f"{self.placement}.{self.layer}"

    @property
    def numbers_per_token(self) -> int:
        """Numbers one virtual token holds here: a key and a value per KV head, ``2 * g * d``."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Geometry:
    """All sites of a base model, in the order the model runs them."""

    sites: tuple[Site, ...]

    @property
    def placements(self) -> tuple[Placement, ...]:
        """The attention stacks there are, each once."""
        return tuple(dict.fromkeys(site.placement for site in self.sites))

    @property
    def numbers_per_token(self) -> int:
        """Numbers one virtual token holds over all sites."""
        return sum(site.numbers_per_token for site in self.sites)

    @property
    def moves_text(self) -> bool:
        """Whether text can stand at later positions behind a prefix: in decoder-only models, and nowhere else.

        The stacks of an encoder-decoder number their texts each from 0, some by distances alone (T5), and what an
        encoder reads has no end to put a prefix before; there a prefix has no position.
        """
        return self.placements == (Placement.DECODER_SELF,)

    def text_position(self, lengths: Sequence[int], *, is_gated: bool, asked: int | None = None) -> int:
        """Return the position of the first text token.

        Args:
            lengths: virtual tokens per site.
            is_gated: the prefix starts as the base model, so by default the text stays where it is.
            asked: `prefix.position_offset`; left out, the longest site (the paper's and PEFT's choice) where text
                moves, and 0 elsewhere.

        Raises:
            ConfigError: a position is asked for that this kind of model cannot give.
        """
        if asked and not self.moves_text:
            raise ConfigError(
                f"prefix.position_offset: text keeps its positions in an encoder; expected 0, got {asked}"
            )
        if asked is not None:
            return asked
        return max(lengths) if self.moves_text and not is_gated else 0

    def num_parameters(self, lengths: Sequence[int]) -> int:
        """Numbers a materialised prefix of these lengths (one per site) holds."""
        return sum(p * site.numbers_per_token for p, site in zip(lengths, self.sites, strict=True))

    def lengths(
        self,
        num_virtual_tokens: int,
        *,
        layers: Sequence[int] | None = None,
        layer_lengths: Sequence[int] | None = None,
        placements: Sequence[Placement] | None = None,
    ) -> tuple[int, ...]:
        """Return the number of virtual tokens at each site.

        Args:
            num_virtual_tokens: length where nothing else is said.
            layers: layers that get a prefix; the others get length 0.
            layer_lengths: one length per layer, in place of `num_virtual_tokens`.
            placements: stacks that get a prefix; the others get length 0.

        Raises:
            ConfigError: a layer or a placement does not exist in this model, or the number of lengths differs
                from the number of layers.
        """
        depth = 1 + max(site.layer for site in self.sites)
        for placement in placements or ():
            if placement not in self.placements:
                known = ", ".join(self.placements)
                raise ConfigError(f"prefix.placement: this model has no {placement} attention, only {known}")
        if layers is not None and max(layers) >= depth:
            raise ConfigError(f"prefix.layers: expected layers 0-{depth - 1} of this model, got {max(layers)}")
        if layer_lengths is not None and len(layer_lengths) != depth:
            raise ConfigError(
                f"prefix.layer_lengths: expected {depth} lengths, one per layer of this model, got {len(layer_lengths)}"
            )

        def length(site: Site) -> int:
            if placements is not None and site.placement not in placements:
                return 0
            if layers is not None and site.layer not in layers:
                return 0
            return num_virtual_tokens if layer_lengths is None else layer_lengths[site.layer]

        return tuple(length(site) for site in self.sites)
