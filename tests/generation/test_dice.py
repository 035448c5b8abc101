"""Choosing tokens, against transformers' own warpers and against the probabilities themselves."""

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from prefixkit.config import GenerationConfig
from prefixkit.errors import ModelError
from prefixkit.generation.dice import TokenChooser, choose, cut, penalise, roll

NO_IDS = torch.zeros(1, 1, dtype=torch.long)


def shares(logits, *, top_k=None, top_p=1.0, dice=20_000):
    """How often each token is chosen when the dice go evenly through [0, 1)."""
    marks = (torch.arange(dice, dtype=torch.float64) + 0.5) / dice
    chosen = choose(logits.expand(dice, -1), marks, top_k=top_k, top_p=top_p)
    return torch.bincount(chosen, minlength=logits.shape[1]) / dice


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (7, 1.0), (None, 0.8), (7, 0.6), (None, 0.05), (99, 0.95)])
def test_tokens_are_chosen_as_often_as_transformers_warped_probabilities_say(top_k, top_p):
    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    expected = logits
    if top_k is not None:
        expected = TopKLogitsWarper(min(top_k, 40))(NO_IDS, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(NO_IDS, expected)
    expected = expected.softmax(dim=1)[0]
    found = shares(logits, top_k=top_k, top_p=top_p)
    assert (found - expected).abs().max() < 2e-4
    assert torch.equal(found > 0, expected > 0) or expected[(found > 0) != (expected > 0)].max() < 1e-4


def test_a_nucleus_wider_than_the_first_look_is_found_whole():
    generator = torch.Generator().manual_seed(4)
    flat, peaked = 0.01 * torch.randn(2, 3000, generator=generator), 20 * torch.randn(2, 3000, generator=generator)
    logits = torch.cat([flat, peaked])[[0, 2, 1, 3]]  # nuclei of about 2700 tokens and of a few, mixed
    marks = torch.tensor([0.9999, 0.9999, 0.5, 0.5], dtype=torch.float64)
    ordered, tokens = logits.softmax(dim=1).double().sort(dim=1, descending=True)
    expected = []
    for row, mark in zip(ordered.tolist(), marks.tolist(), strict=True):
        nucleus = 1 + next(i for i in range(len(row)) if sum(row[: i + 1]) >= 0.9)
        total = sum(row[:nucleus])
        expected.append(next(i for i in range(nucleus) if sum(row[: i + 1]) > mark * total))
    ranks = (tokens == choose(logits, marks, top_p=0.9)[:, None]).nonzero()[:, 1].tolist()
    assert expected[0] > 2500
    assert expected[1] < 50
    assert all(abs(found - rank) <= 1 for found, rank in zip(ranks, expected, strict=True))  # float32 at the edge


def test_the_nucleus_is_transformers_own():
    weights = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    assert cut(weights, 0.75)[0].tolist() == pytest.approx([0.4, 0.3, 0.2, 0.0])
    assert cut(weights, 0.01)[0].tolist() == pytest.approx([0.4, 0.0, 0.0, 0.0])
    assert cut(weights, 1.0).gt(0).all()


def test_the_ends_of_the_dice_choose_tokens_that_have_weight():
    logits = torch.tensor([[-torch.inf, 1.0, 0.0, -torch.inf]])
    almost_one = 1 - 2**-53
    assert choose(logits, torch.tensor([0.0], dtype=torch.float64)).item() == 1
    assert choose(logits, torch.tensor([almost_one], dtype=torch.float64)).item() == 2


def test_dice_belong_to_the_place_not_to_the_batch():
    together = roll(0, [4, 9], 6)
    assert torch.equal(together[1], roll(0, [9], 6)[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(roll(1, [9], 6), roll(0, [9], 6))
    assert torch.equal(roll(0, [9], 3)[0], together[1, :3])


def test_the_penalty_is_transformers_own_where_nothing_is_padded():
    scores = torch.randn(2, 11, generator=torch.Generator().manual_seed(5))
    ids = torch.tensor([[1, 2, 2], [10, 0, 3]])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, scores.clone())
    assert torch.equal(penalise(scores, ids, torch.ones(2, 3, dtype=torch.bool), 1.7), expected)


def test_padding_is_not_penalised():
    scores = torch.ones(1, 5)
    ids = torch.tensor([[2, 2, 3]])
    found = penalise(scores, ids, torch.tensor([[False, False, True]]), 2.0)
    assert found.tolist() == [[1.0, 1.0, 1.0, 0.5, 1.0]]


def test_a_token_seen_many_times_is_still_penalised():
    ids = torch.zeros(1, 256, dtype=torch.long)  # a count of 256 would be 0 in eight bits
    assert penalise(torch.ones(1, 2), ids, torch.ones(1, 256, dtype=torch.bool), 2.0).tolist() == [[0.5, 1.0]]


def test_logits_that_are_not_numbers_are_refused():
    settings = GenerationConfig()
    is_text = torch.ones(1, 1, dtype=torch.bool)
    chooser = TokenChooser(settings, torch.zeros(1, 80, dtype=torch.float64), is_text)
    with pytest.raises(ModelError) as caught:
        chooser(NO_IDS, torch.tensor([[0.0, torch.nan]]))
    assert str(caught.value) == (
        "the model's logits are NaN or infinite: the artefact or the base model is damaged, or the dtype too narrow; "
        "try model.dtype=float32"
    )


def test_a_very_cold_temperature_takes_the_likeliest_token():
    chooser = TokenChooser(
        GenerationConfig(temperature=1e-30),
        torch.full((1, 1), 0.999, dtype=torch.float64),
        torch.ones(1, 1).bool(),
    )
    scores = chooser(NO_IDS, torch.tensor([[1.0, 30.0, 29.9]]))
    assert scores.argmax().item() == 1


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 5}, {"top_k": 40, "top_p": 0.5}])
def test_a_large_batch_is_chosen_for_a_few_rows_at_a_time_all_the_same(settings, monkeypatch):
    """So that what sampling takes does not grow with the batch."""
    generator = torch.Generator().manual_seed(0)
    logits, dice = torch.randn(13, 300, generator=generator), torch.rand(13, generator=generator, dtype=torch.float64)
    whole = choose(logits, dice, **settings)
    largest = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda own, dim: largest.append(len(own)) or softmax(own, dim=dim))
    monkeypatch.setattr("prefixkit.generation.dice._AT_ONCE", 1000)
    assert torch.equal(choose(logits, dice, **settings), whole)
    assert max(largest) == 3
