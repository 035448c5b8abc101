"""Where a prefix starts. Initialisation and learning rate decide the result more than anything else.

Every kind comes down to one question, which states should the encoder produce at step 0, and one operation,
`reproduce`: at depth 0 the states are copied; through an MLP its last layer is solved for by least squares, so
that the MLP reproduces them (the paper's code fits it with 500 Adam steps; a linear layer needs no steps).

Li & Liang (2021), §7.4 and Figure 5: real words beat random numbers, most of all with little data.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefixkit.errors import ConfigError, InjectionError
from prefixkit.prefix.encoder import PrefixEncoder
from prefixkit.prefix.states import PrefixStates, SiteStates

#: Largest allowed error of reproduced states, relative to their root mean square.
TOLERANCE = 1e-4


@torch.no_grad()
def init_mlp(encoder: PrefixEncoder, generator: torch.Generator, *, orthogonal: bool = True) -> None:
    """Initialise the table and the MLP; does nothing at depth 0.

    Args:
        encoder: the encoder to change in place.
        generator: source of randomness, on the CPU.
        orthogonal: orthogonal weights (Saxe et al., 2014) keep the virtual tokens' rows apart through every
            layer; otherwise normal numbers with variance ``1 / width``.
    """
    if encoder.depth == 0:
        return
    encoder.table.copy_(torch.randn(encoder.table.shape, generator=generator))
    for layer in encoder.modules():
        if isinstance(layer, nn.Linear):
            weight = torch.empty(layer.weight.shape)
            if orthogonal:
                nn.init.orthogonal_(weight, generator=generator)
            else:
                weight.normal_(std=layer.in_features**-0.5, generator=generator)
            layer.weight.copy_(weight)
            layer.bias.zero_()


@torch.no_grad()
def init_random(encoder: PrefixEncoder, generator: torch.Generator, *, std: float) -> None:
    """Start from normal numbers with standard deviation `std` (through an MLP: scaled to it)."""
    if encoder.depth == 0:
        for pair in encoder.states:
            pair.copy_(std * torch.randn(pair.shape, generator=generator))
        return
    rows = encoder.last(encoder.hidden(encoder.table))  # [p, o]
    encoder.last.weight.mul_(std / rows.std())


@torch.no_grad()
def init_zero(encoder: PrefixEncoder) -> None:
    """Start from zeros. Not neutral: zero keys still take a share of every softmax (use a gate for that).

    At depth 0 the virtual tokens of a site then stay alike, as their gradients are the same; `distinct_tokens` tells.
    """
    for parameter in list(encoder.states) if encoder.depth == 0 else list(encoder.last.parameters()):
        parameter.zero_()


@torch.no_grad()
def distinct_tokens(encoder: PrefixEncoder) -> int:
    """Return how many virtual tokens can learn apart, where they do most.

    Attention is blind to the order of keys, so that at depth 0 two virtual tokens that start alike at a site get the
    same gradients there, and stay alike; through an MLP each has a row of the table to itself.
    """
    if encoder.depth > 0:
        return len(encoder.table)
    rows = (pair.permute(2, 0, 1, 3).flatten(1) for pair in encoder.states)  # [p, 2 g d]
    return max(len(torch.unique(each, dim=0)) if len(each) else 0 for each in rows)


@torch.no_grad()
def match_units(encoder: PrefixEncoder, states: PrefixStates) -> None:
    """Count each site's keys, and its values, in the power of two nearest to their root mean square in `states`.

    A power of two, so that counting in it rounds nothing. A site without states, or with zeros alone, keeps its unit.
    Call it before the encoder is initialised.
    """
    for row, site in zip(encoder.units, states.sites, strict=True):
        for column, part in enumerate((site.key, site.value)):
            size = part.double().square().mean().sqrt()
            if size > 0:  # not so where there is nothing: nan
                row[column] = 2.0 ** size.log2().round()


@torch.no_grad()
def reproduce(encoder: PrefixEncoder, target: PrefixStates) -> float:
    """Make the encoder produce the target states, and its gates those of the target where it has any.

    Args:
        encoder: the encoder to change in place.
        target: states of the same geometry; sites are cut or repeated to the encoder's lengths.

    Returns:
        The largest error relative to the target's root mean square: 0 at depth 0, below `TOLERANCE` otherwise.

    Raises:
        InjectionError: the target has another geometry.
        ConfigError: the MLP is too narrow to reproduce that many virtual tokens, or the states are so small that
            its own numbers round them away.
    """
    if target.geometry != encoder.geometry:
        raise InjectionError("init: the states belong to a model of another geometry")
    empty = [s.name for s, have, want in zip(target.geometry.sites, target.lengths, encoder.lengths, strict=True)
             if want and not have]  # fmt: skip
    if empty:
        raise InjectionError(f"init: the states are empty at {empty[0]}, where the prefix has virtual tokens")
    if target.has_gate and encoder.gates is None:
        raise ConfigError("prefix.gate: the prefix to start from is gated; set prefix.gate=true")
    if target.has_gate and encoder.gates is not None:
        for gate, states in zip(encoder.gates, target.sites, strict=True):
            if len(gate):
                gate.copy_(torch.ones_like(gate) if states.gate is None else states.gate)
    target = _in_units(encoder, target)
    if encoder.depth == 0:
        for pair, states in zip(encoder.states, target.slice(encoder.lengths).sites, strict=True):
            pair[0].copy_(states.key)
            pair[1].copy_(states.value)
        return 0.0
    tokens = tuple(len(encoder.table) if q else 0 for q in encoder.lengths)
    error = _solve_last_layer(encoder, target.slice(tokens).to_rows())
    if error > TOLERANCE and encoder.table.shape[1] >= len(encoder.table):
        raise ConfigError(
            f"prefix.reparam_depth: the MLP reproduces the states only to {error:.1g} of their size, {TOLERANCE:g} is "
            "asked for; use another reparam_activation, a wider MLP, or reparam_depth=0"
        )
    if error > TOLERANCE:
        raise ConfigError(
            f"prefix.reparam_width: {encoder.table.shape[1]} is too narrow for the MLP to reproduce "
            f"{len(encoder.table)} virtual tokens (error {error:.1g}); use at least {len(encoder.table)}"
        )
    return error


def _in_units(encoder: PrefixEncoder, states: PrefixStates) -> PrefixStates:
    sites = zip(states.sites, encoder.units.to(states.sites[0].key), strict=True)
    counted = (SiteStates(site.key / unit[0], site.value / unit[1], site.gate) for site, unit in sites)
    return PrefixStates(states.geometry, tuple(counted))


def _solve_last_layer(encoder: PrefixEncoder, target: Float[Tensor, "p o"]) -> float:
    """Change the last layer by the smallest amount that makes the MLP produce `target`."""
    features = encoder.hidden(encoder.table).double()  # [p, w]
    features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)  # [p, w + 1], for the bias
    layer = encoder.last
    present = torch.cat([layer.weight, layer.bias[:, None]], dim=1).double()  # [o, w + 1]
    residual = target.double() - features @ present.T  # [p, o]
    change = torch.linalg.lstsq(features, residual, driver="gelsd").solution.T  # [o, w + 1], least norm
    layer.weight.add_(change[:, :-1])
    layer.bias.add_(change[:, -1])
    produced = layer(encoder.hidden(encoder.table)).double()
    scale = target.double().square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return float((produced - target).abs().max() / scale)
