"""The encoder's numbers: shapes, counts, materialising, reproducing."""

import pytest
import torch

from prefixkit.config import Placement
from prefixkit.errors import ConfigError
from prefixkit.prefix import Geometry, PrefixEncoder, PrefixStates, Site, SiteStates, init_mlp, init_random, reproduce

GEOMETRY = Geometry(tuple(Site(Placement.DECODER_SELF, layer, 4, 2, 3) for layer in range(3)))


def random_states(*lengths: int) -> PrefixStates:
    dice = torch.Generator().manual_seed(1)
    return PrefixStates(
        GEOMETRY,
        tuple(SiteStates(torch.randn(2, p, 3, generator=dice), torch.randn(2, p, 3, generator=dice)) for p in lengths),
    )


def make(depth: int, *lengths: int, width: int = 8, **options: object) -> PrefixEncoder:
    encoder = PrefixEncoder(GEOMETRY, lengths, depth=depth, width=width, **options)  # type: ignore[arg-type]
    init_mlp(encoder, torch.Generator().manual_seed(0))
    return encoder


def test_parameters_are_counted_as_the_paper_counts_them() -> None:
    gpt2 = Geometry(tuple(Site(Placement.DECODER_SELF, layer, 12, 12, 64) for layer in range(12)))
    assert PrefixEncoder(gpt2, (20,) * 12).num_parameters() == 368_640
    assert make(0, 4, 0, 2).num_parameters() == (4 + 0 + 2) * 2 * 2 * 3
    assert make(2, 4, 4, 4, width=8).num_parameters() == 4 * 8 + (8 * 8 + 8) + (8 * 36 + 36)
    assert make(2, 4, 0, 4, width=8).num_parameters() == 4 * 8 + (8 * 8 + 8) + (8 * 24 + 24)
    gated = make(0, 4, 0, 2, gated=True)
    assert gated.num_parameters() == (4 + 2) * 2 * 2 * 3 + 2 * gated.geometry.sites[0].query_heads
    assert [site.gate is None for site in gated.materialise().sites] == [False, True, False]


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("lengths", [(4, 4, 4), (4, 0, 2)])
def test_the_encoder_reproduces_given_states(depth: int, lengths: tuple[int, ...]) -> None:
    target = random_states(*lengths)
    encoder = make(depth, *lengths)
    error = reproduce(encoder, target)
    assert error == 0 if depth == 0 else error < 1e-4
    for made, wanted in zip(encoder.materialise().sites, target.sites, strict=True):
        torch.testing.assert_close(made.key, wanted.key, atol=1e-4, rtol=0)
        torch.testing.assert_close(made.value, wanted.value, atol=1e-4, rtol=0)


@pytest.mark.parametrize("depth", [0, 2])
def test_materialising_equals_the_forward_pass_without_dropout(depth: int) -> None:
    encoder = make(depth, 4, 4, 4, dropout=0.5)
    reproduce(encoder, random_states(4, 4, 4))
    encoder.train()
    dropped = encoder().sites[0].key
    kept = encoder.materialise()
    assert encoder.training
    assert torch.equal(encoder.eval()().sites[0].key, kept.sites[0].key)
    assert (dropped == 0).any()
    assert not (kept.sites[0].key == 0).any()


def test_a_materialised_prefix_does_not_follow_later_training() -> None:
    encoder = make(0, 2, 2, 2)
    states = encoder.materialise()
    before = states.sites[0].key.clone()
    with torch.no_grad():
        encoder.states[0].add_(1)
    assert torch.equal(states.sites[0].key, before)


def test_an_mlp_too_narrow_for_its_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prefix.reparam_width: 3 is too narrow .* 9 virtual tokens .* at least 9"):
        reproduce(make(2, 9, 9, 9, width=3), random_states(9, 9, 9))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_random_start_has_the_deviation_asked_for(depth: int) -> None:
    encoder = make(depth, 50, 50, 50, width=64)
    init_random(encoder, torch.Generator().manual_seed(0), std=0.3)
    assert encoder.materialise().sites[1].value.std() == pytest.approx(0.3, rel=0.15)


def test_orthogonal_hidden_weights_are_orthogonal() -> None:
    weight = make(2, 4, 4, 4).hidden[0].weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(8), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("lengths", "depth", "message"),
    [((1, 1, 1), 4, "depth: expected 0-3, got 4"), ((0, 0, 0), 0, "every layer has length 0")],
)
def test_what_cannot_be_built_is_refused(lengths: tuple[int, ...], depth: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrefixEncoder(GEOMETRY, lengths, depth=depth)


def test_layers_and_lengths_that_do_not_fit_the_model_are_named() -> None:
    assert GEOMETRY.lengths(5, layers=[1]) == (0, 5, 0)
    assert GEOMETRY.lengths(5, layer_lengths=[1, 0, 2]) == (1, 0, 2)
    with pytest.raises(ConfigError, match="prefix.layers: expected layers 0-2 of this model, got 3"):
        GEOMETRY.lengths(5, layers=[3])
    with pytest.raises(
        ConfigError, match="prefix.layer_lengths: expected 3 lengths, one per layer of this model, got 2"
    ):
        GEOMETRY.lengths(5, layer_lengths=[1, 2])
    with pytest.raises(ConfigError, match="prefix.placement: this model has no cross attention, only decoder_self"):
        GEOMETRY.lengths(5, placements=[Placement.CROSS])
