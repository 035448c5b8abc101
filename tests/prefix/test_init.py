"""Where a prefix starts: every kind, at every depth, from a generator alone."""

import pytest
import torch

from prefixkit.config import Activation, Placement
from prefixkit.errors import ConfigError, InjectionError
from prefixkit.prefix import (
    Geometry,
    PrefixEncoder,
    PrefixStates,
    Site,
    SiteStates,
    distinct_tokens,
    init_mlp,
    init_random,
    init_zero,
    match_units,
    reproduce,
)
from prefixkit.prefix.init import TOLERANCE


def geometry(kv_heads: int = 2) -> Geometry:
    return Geometry(tuple(Site(Placement.DECODER_SELF, layer, 4, kv_heads, 3) for layer in range(3)))


def states(*lengths: int, scale: float = 1.0, gated: bool = False, kv_heads: int = 2) -> PrefixStates:
    dice = torch.Generator().manual_seed(1)
    sites = tuple(
        SiteStates(
            scale * torch.randn(kv_heads, p, 3, generator=dice),
            scale * torch.randn(kv_heads, p, 3, generator=dice),
            torch.rand(4, generator=dice) if gated else None,
        )
        for p in lengths
    )
    return PrefixStates(geometry(kv_heads), sites)


def make(depth: int, *lengths: int, seed: int = 0, orthogonal: bool = True, **options: object) -> PrefixEncoder:
    encoder = PrefixEncoder(geometry(), lengths, depth=depth, **{"width": 16} | options)  # type: ignore[arg-type]
    init_mlp(encoder, torch.Generator().manual_seed(seed), orthogonal=orthogonal)
    return encoder


def same(one: PrefixStates, other: PrefixStates) -> bool:
    return all(
        torch.equal(a.key, b.key) and torch.equal(a.value, b.value) for a, b in zip(one.sites, other.sites, strict=True)
    )


@pytest.mark.parametrize("scale", [0.05, 1.0, 300.0])
@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_an_mlp_reproduces_states_of_any_scale(depth: int, activation: Activation, scale: float) -> None:
    target = states(5, 0, 3, scale=scale)  # 3 does not divide 5: which rows a shorter site takes is seen
    encoder = make(depth, 5, 0, 3, activation=activation)
    error = reproduce(encoder, target)
    assert 0 < error < TOLERANCE
    for made, wanted in zip(encoder.materialise().sites, target.sites, strict=True):
        torch.testing.assert_close(made.key, wanted.key, atol=2e-4 * scale, rtol=0)
        torch.testing.assert_close(made.value, wanted.value, atol=2e-4 * scale, rtol=0)


def test_states_an_mlp_would_round_away_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"prefix.reparam_depth: the MLP reproduces the states only to .* of their size"
    ):
        reproduce(make(2, 5, 5, 5), states(5, 5, 5, scale=1e-6))


def test_depth_zero_copies_exactly_and_independently() -> None:
    target = states(4, 0, 2)
    encoder = make(0, 4, 0, 2)
    assert reproduce(encoder, target) == 0
    assert same(encoder.materialise(), target)
    with torch.no_grad():
        encoder.states[0].add_(1)
    assert same(target, states(4, 0, 2))


@pytest.mark.parametrize("depth", [0, 2])
def test_a_shorter_start_is_repeated_and_a_longer_one_cut_at_its_end(depth: int) -> None:
    target = states(2, 7, 4)
    encoder = make(depth, 4, 4, 4)
    reproduce(encoder, target)
    made = encoder.materialise().sites
    torch.testing.assert_close(made[0].key, target.sites[0].key[:, [0, 1, 0, 1]], atol=1e-4, rtol=0)
    torch.testing.assert_close(made[1].value, target.sites[1].value[:, :4], atol=1e-4, rtol=0)


def test_gates_start_as_those_of_the_prefix_or_at_zero() -> None:
    gated, plain = make(0, 2, 2, 2, gated=True), make(0, 2, 2, 2, gated=True)
    target = states(2, 2, 2, gated=True)
    reproduce(gated, target)
    reproduce(plain, states(2, 2, 2))
    assert gated.gates is not None
    assert plain.gates is not None
    assert all(torch.equal(gate, site.gate) for gate, site in zip(gated.gates, target.sites, strict=True))  # type: ignore[arg-type]
    assert not any(gate.any() for gate in plain.gates)


def test_what_cannot_be_started_from_is_refused() -> None:
    with pytest.raises(InjectionError, match="init: the states belong to a model of another geometry"):
        reproduce(make(0, 2, 2, 2), states(2, 2, 2, kv_heads=1))
    with pytest.raises(
        InjectionError, match=r"states are empty at decoder_self.1, where the prefix has virtual tokens"
    ):
        reproduce(make(0, 2, 2, 2), states(2, 0, 2))
    with pytest.raises(ConfigError, match=r"prefix.gate: the prefix to start from is gated; set prefix.gate=true"):
        reproduce(make(0, 2, 2, 2), states(2, 2, 2, gated=True))


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_zero_start_is_zero_and_learns(depth: int) -> None:
    encoder = make(depth, 4, 4, 4)
    init_random(encoder, torch.Generator().manual_seed(0), std=1.0)
    init_zero(encoder)
    assert not any(site.key.any() or site.value.any() for site in encoder.materialise().sites)
    sum(site.key.sum() for site in encoder().sites).backward()
    assert any(p.grad is not None and p.grad.any() for p in encoder.parameters())


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_generator_alone_decides(depth: int, orthogonal: bool) -> None:
    def start(seed: int) -> PrefixStates:
        encoder = make(depth, 4, 4, 4, seed=seed, orthogonal=orthogonal)
        init_random(encoder, torch.Generator().manual_seed(seed), std=0.1)
        return encoder.materialise()

    torch.manual_seed(1)
    first = start(0)
    torch.manual_seed(2)
    assert same(first, start(0))
    assert not same(first, start(1))


@pytest.mark.parametrize("depth", [0, 2])
def test_dropout_scales_what_it_keeps_and_leaves_evaluation_alone(depth: int) -> None:
    encoder = make(depth, 200, 0, 200, width=256, dropout=0.25).train()
    reproduce(encoder, states(200, 0, 200))
    kept = encoder.materialise()
    assert encoder.training
    dropped, whole = encoder().sites[2].value, kept.sites[2].value
    gone = dropped == 0
    assert float(gone.float().mean()) == pytest.approx(0.25, abs=0.06)  # 1200 numbers: 4.8 standard deviations
    torch.testing.assert_close(dropped[~gone], whole[~gone] / 0.75)
    assert same(encoder.eval()(), kept)


def uneven() -> PrefixStates:
    """States whose sites differ in size, as a model's do; one holds nothing but zeros."""
    sizes, (even, *_) = [(3000.0, 0.7), (5.0, 1e-3), (0.0, 0.0)], states(4, 4, 4).sites
    return PrefixStates(geometry(), tuple(SiteStates(k * even.key, v * even.value) for k, v in sizes))


@pytest.mark.parametrize("depth", [0, 2])
def test_units_are_powers_of_two_and_change_nothing_at_the_start(depth: int) -> None:
    target = uneven()
    encoder = make(depth, 4, 4, 4)
    match_units(encoder, target)
    sizes = [[float(part.square().mean().sqrt()) for part in (s.key, s.value)] for s in target.sites[:2]]
    for row, (key, value) in zip(encoder.units, sizes, strict=False):
        assert key / 2**0.5 <= row[0] <= key * 2**0.5
        assert value / 2**0.5 <= row[1] <= value * 2**0.5
    assert torch.equal(encoder.units.log2(), encoder.units.log2().round())
    assert encoder.units[2].tolist() == [1, 1]
    error = reproduce(encoder, target)
    if depth == 0:
        assert error == 0
        assert same(encoder.materialise(), target)
    else:
        assert error < TOLERANCE
        for made, wanted in zip(encoder.materialise().sites, target.sites, strict=True):
            for part, expected in ((made.key, wanted.key), (made.value, wanted.value)):
                torch.testing.assert_close(part, expected, atol=1e-4 * float(expected.std()) + 1e-6, rtol=1e-4)


@pytest.mark.parametrize("depth", [0, 2])
def test_an_encoders_state_is_all_that_another_needs(depth: int) -> None:
    """Units too: keys and values would be of another size without them."""
    target = uneven()
    encoder, other = make(depth, 4, 4, 4), make(depth, 4, 4, 4, seed=1)
    match_units(encoder, target)
    reproduce(encoder, target)
    assert (encoder.units != 1).any()
    other.load_state_dict(encoder.state_dict())
    assert same(other.materialise(), encoder.materialise())


def test_a_state_from_before_there_were_units_has_units_of_one() -> None:
    encoder = make(0, 4, 4, 4)
    state = {name: tensor + 1 for name, tensor in encoder.state_dict().items() if name != "units"}
    match_units(encoder, uneven())
    encoder.load_state_dict(state)
    assert (encoder.units == 1).all()
    assert torch.equal(encoder.materialise().sites[1].value, state["states.1"][1])


@pytest.mark.parametrize("depth", [0, 1])
def test_an_encoder_is_born_with_virtual_tokens_that_can_learn_apart(depth: int) -> None:
    encoder = PrefixEncoder(geometry(), (4, 0, 3), depth=depth, width=8)
    assert distinct_tokens(encoder) == 4
    assert all(len(torch.unique(site.key, dim=1)[0]) == len(site.key[0]) for site in encoder.materialise().sites)


def test_a_site_without_virtual_tokens_keeps_its_unit() -> None:
    encoder = make(0, 4, 0, 2)
    match_units(encoder, states(4, 0, 2, scale=64.0))
    assert encoder.units[1].tolist() == [1, 1]
    assert encoder.units[0].min() > 1


def test_a_step_moves_every_site_in_proportion_to_its_size() -> None:
    """Adam's first step is the learning rate, whatever the gradient's size."""
    target = uneven()
    encoder = make(0, 4, 4, 4)
    match_units(encoder, target)
    reproduce(encoder, target)
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=0.25, weight_decay=0.0)
    sum(site.key.sum() + site.value.sum() for site in encoder().sites).backward()  # type: ignore[union-attr]
    optimiser.step()
    for made, wanted, unit in zip(encoder.materialise().sites, target.sites, encoder.units, strict=True):
        for part, before, size in ((made.key, wanted.key, unit[0]), (made.value, wanted.value, unit[1])):
            torch.testing.assert_close(before - part, 0.25 * size.expand_as(part), atol=1e-3 * float(size), rtol=0)


def test_small_states_an_mlp_would_round_away_are_kept_in_units_of_their_own() -> None:
    target = states(5, 5, 5, scale=1e-6)
    encoder = make(2, 5, 5, 5)
    match_units(encoder, target)
    assert reproduce(encoder, target) < TOLERANCE
