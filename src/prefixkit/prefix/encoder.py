"""What a prefix is: a few virtual tokens, trained as keys and values of every attention layer.

This is one of the two files to read first (the other is `injection/attention.py`: how a frozen model reads a
prefix). Li & Liang (2021), §4.3: a prefix of `p` virtual tokens is a matrix ``P`` with one row per token,
holding that token's keys and values for all layers. Training ``P`` itself is reparameterisation depth 0. With
depth ``n >= 1`` it is produced from a smaller table ``P'`` by an MLP shared by all virtual tokens,

    P[i, :] = MLP(P'[i, :])                                                         (§4.3)

and after training only ``P`` is kept: `materialise` runs the MLP once and drops it.

    table P'           [p, w]
      hidden layers    [p, w] -> [p, w]     (depth - 1 of them, each followed by the activation)
      last layer       [p, w] -> [p, o]     o = sum of 2 * g * d over sites that have virtual tokens
    split per site     key, value: [g, p, d] each, times their unit

Units: the keys and values of one layer may be many times as large as those of another, and Adam moves every number by
about the learning rate. So each site's keys and its values are counted in a unit of their own (`init.match_units`), and
one learning rate suits them all.

The encoder runs once per training step on `p` rows, whatever the batch size: all rows of a batch share its
output (PEFT runs its MLP on ``b * p`` rows). Where the paper's table is as wide as the model, ours is `w` wide.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefixkit.config import Activation
from prefixkit.errors import ConfigError
from prefixkit.prefix.geometry import Geometry
from prefixkit.prefix.states import PrefixStates, SiteStates

_ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    Activation.TANH: nn.Tanh,
    Activation.RELU: nn.ReLU,
    Activation.GELU: nn.GELU,
    Activation.SILU: nn.SiLU,
}

#: Standard deviation of the numbers an encoder is born with. Not 0: equal virtual tokens get equal gradients for ever.
_SMALL = 0.02


class PrefixEncoder(nn.Module):
    """The trainable prefix; calling it returns the prefix states of the present step.

    It starts from small random numbers of torch's global generator; `prefix.init` has the starts that are worth having.

    Args:
        geometry: the sites of the base model.
        lengths: number of virtual tokens per site; 0 leaves a site alone and costs no parameters.
        depth: layers of the reparameterisation MLP, 0-3.
        width: `w`, width of the MLP and its table; ignored at depth 0.
        activation: non-linearity after each hidden layer.
        dropout: share of keys and values set to zero while training (the rest is scaled up).
        gated: adds a gate per site and query head that starts at 0, so that step 0 is the base model exactly.
        dtype: number format of the parameters; float32 keeps small updates even for a bfloat16 base model.

    Attributes:
        units: what the keys (column 0) and values (column 1) of each site are counted in, [sites, 2]; not trained.

    Raises:
        ConfigError: depth is outside 0-3, or every length is 0.
    """

    def __init__(
        self,
        geometry: Geometry,
        lengths: Sequence[int],
        *,
        depth: int = 0,
        width: int = 512,
        activation: Activation = Activation.TANH,
        dropout: float = 0.0,
        gated: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not 0 <= depth <= 3:
            raise ConfigError(f"depth: expected 0-3, got {depth}")
        if not any(lengths):
            raise ConfigError("prefix: every layer has length 0; nothing would be trained")
        self.geometry = geometry
        self.lengths = tuple(lengths)
        sites = list(zip(geometry.sites, self.lengths, strict=True))
        self._widths = [site.numbers_per_token if p else 0 for site, p in sites]
        self.depth = depth
        self.dropout = dropout
        self.units: Float[Tensor, "s 2"]
        self.register_buffer("units", torch.ones(len(sites), 2, dtype=dtype))
        if depth == 0:
            shapes = [(2, site.kv_heads, p, site.head_dim) for site, p in sites]
            self.states = _parameters(_SMALL * torch.randn(shape, dtype=dtype) for shape in shapes)
        else:
            self.table = nn.Parameter(torch.randn(max(self.lengths), width, dtype=dtype))
            hidden = [
                layer
                for _ in range(depth - 1)
                for layer in (nn.Linear(width, width, dtype=dtype), _ACTIVATIONS[activation]())
            ]
            self.hidden = nn.Sequential(*hidden)
            self.last = nn.Linear(width, sum(self._widths), dtype=dtype)
        gates = (torch.zeros(site.query_heads if p else 0, dtype=dtype) for site, p in sites)
        self.gates = _parameters(gates) if gated else None

    def forward(self) -> PrefixStates:
        """Return the prefix states, with gradients to the encoder's parameters."""
        sites = []
        for place, (pair, units) in enumerate(zip(self._pairs(), self.units, strict=True)):
            in_full = pair * units[:, None, None, None]  # [2, g, p, d]
            key, value = nn.functional.dropout(in_full, self.dropout, self.training)
            gate = self.gates[place] if self.gates is not None and key.shape[1] else None
            sites.append(SiteStates(key, value, gate))
        return PrefixStates(self.geometry, tuple(sites))

    def _pairs(self) -> list[Float[Tensor, "2 g q d"]]:
        """Return each site's keys and values, in its units; a site of length q < p takes the MLP's first q rows."""
        if self.depth == 0:
            return list(self.states)
        rows = self.last(self.hidden(self.table))  # [p, w] -> [p, o]
        parts = rows.split(self._widths, dim=1)  # [p, 2gd] per site
        return [
            part[:q].view(q, 2, site.kv_heads, site.head_dim).permute(1, 2, 0, 3)  # [q, 2gd] -> [2, g, q, d]
            for part, site, q in zip(parts, self.geometry.sites, self.lengths, strict=True)
        ]

    @torch.no_grad()
    def materialise(self) -> PrefixStates:
        """Return the prefix as plain tensors: the MLP is folded away, dropout does not apply.

        The result equals what `forward` returns in evaluation mode, bit for bit.
        """
        was_training = self.training
        self.eval()
        try:
            states: PrefixStates = self()
            return states.detach()
        finally:
            self.train(was_training)

    def text_position(self, asked: int | None = None) -> int:
        """Return the position of the first text token: the one asked for, or `Geometry.text_position`.

        Raises:
            ConfigError: a position is asked for that this kind of model cannot give.
        """
        return self.geometry.text_position(self.lengths, is_gated=self.gates is not None, asked=asked)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Take a state from before there were units for one in which all are 1."""
        state_dict.setdefault(f"{prefix}units", torch.ones_like(self.units))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def num_parameters(self) -> int:
        """Numbers that are trained (with an MLP, more than the materialised prefix keeps)."""
        return sum(parameter.numel() for parameter in self.parameters())


def _parameters(tensors: Iterable[Tensor]) -> nn.ParameterList:
    """Make them parameters; an empty one, of a site without virtual tokens, has no gradient that DDP could wait for."""
    return nn.ParameterList(nn.Parameter(each, requires_grad=each.numel() > 0) for each in tensors)
