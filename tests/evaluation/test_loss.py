"""Held-out loss against a double loop in float64."""

import dataclasses
import math

import pytest
import torch

from prefixkit.config import Method, MethodConfig
from prefixkit.data import Example
from prefixkit.errors import EvaluationError
from prefixkit.evaluation import heldout_loss
from prefixkit.evaluation import loss as loss_module
from prefixkit.injection import attach
from prefixkit.methods import build_delta
from prefixkit.prefix import Prefix, PrefixStates


def example(ids, labels=None):
    return Example("", "", tuple(ids), tuple(ids if labels is None else labels))


EXAMPLES = [
    example([1, 10, 11, 12, 13]),
    example([1, 20, 21], [-100, -100, 21]),
    example([1, 30, 31, 32, 33, 34, 35, 36], [-100, -100, 31, -100, 33, 34, -100, 36]),
    example([50, 51], [50, 51]),  # the first token has a label but nothing before it
]


def slow_nats(base, each, prefix):
    """One forward pass per scored token, log-probabilities in float64."""
    total = 0.0
    with torch.no_grad(), attach(base.model, prefix):
        for t in range(1, len(each.input_ids)):
            if each.labels[t] != -100:
                logits = base.model(torch.tensor([each.input_ids[:t]]), use_cache=False).logits[0, -1]
                total -= logits.double().log_softmax(0)[each.labels[t]].item()
    return total


@pytest.mark.parametrize("has_prefix", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_losses_equal_a_slow_loop(base, prefix, has_prefix, batch_size):
    chosen = prefix if has_prefix else None
    losses = heldout_loss(base, EXAMPLES, prefix=chosen, batch_size=batch_size)
    assert losses.nats == pytest.approx([slow_nats(base, each, chosen) for each in EXAMPLES], abs=1e-10)
    assert losses.tokens == (4, 1, 4, 1)


@pytest.mark.parametrize("has_prefix", [False, True])
def test_late_losses_are_those_of_the_second_half_of_what_is_scored(base, prefix, has_prefix):
    chosen = prefix if has_prefix else None
    losses = heldout_loss(base, EXAMPLES, prefix=chosen)
    ends = [[-100, -100, -100, 12, 13], [-100] * 3, [-100] * 5 + [34, -100, 36], [-100] * 2]
    late = [dataclasses.replace(each, labels=tuple(end)) for each, end in zip(EXAMPLES, ends, strict=True)]
    assert losses.late.nats == pytest.approx([slow_nats(base, each, chosen) for each in late], abs=1e-10)
    assert losses.late.tokens == (2, 0, 2, 0)
    assert losses.early.tokens == (2, 1, 2, 1)
    together = [early + late for early, late in zip(losses.early.nats, losses.late.nats, strict=True)]
    assert together == pytest.approx(losses.nats, abs=1e-12)


def test_every_token_counts_the_same(base):
    losses = heldout_loss(base, EXAMPLES)
    assert losses.mean == pytest.approx(sum(losses.nats) / 10, abs=1e-12)
    assert losses.perplexity == pytest.approx(math.exp(losses.mean))


def test_the_prefix_changes_the_loss(base, prefix):
    assert abs(heldout_loss(base, EXAMPLES).mean - heldout_loss(base, EXAMPLES, prefix=prefix).mean) > 0.01


def test_bfloat16_logits_are_summed_in_float32(base):
    low = dataclasses.replace(base, model=base.model.bfloat16(), dtype=torch.bfloat16)
    with torch.no_grad():
        logits = low.model(torch.tensor([EXAMPLES[0].input_ids])).logits[0]
    expected = -logits[:-1].float().log_softmax(1).gather(1, torch.tensor([[10], [11], [12], [13]])).sum().item()
    assert heldout_loss(low, EXAMPLES[:1]).nats[0] == pytest.approx(expected, abs=1e-5)


def test_a_batch_is_cut_where_its_logits_would_be_too_many(base, monkeypatch):
    whole = heldout_loss(base, EXAMPLES)
    sizes = []
    monkeypatch.setattr(loss_module, "MOST_LOGITS", 1)
    original = loss_module._batch_losses

    def counted(base, batch):
        sizes.append(len(batch["labels"]))
        return original(base, batch)

    monkeypatch.setattr(loss_module, "_batch_losses", counted)
    assert heldout_loss(base, EXAMPLES).nats == pytest.approx(whole.nats, abs=1e-10)
    assert sizes == [1, 1, 1, 1]


def test_progress_ends_at_all_examples(base):
    calls = []
    heldout_loss(base, EXAMPLES, batch_size=3, on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(3, 4), (4, 4)]


@pytest.mark.parametrize("examples", [[], [example([1, 2, 3], [-100] * 3)], [example([5])]])
def test_nothing_to_score_is_an_error(base, examples):
    with pytest.raises(EvaluationError, match=rf"^{len(examples)} held-out texts, none with a token to score; give"):
        heldout_loss(base, examples)


def test_a_text_beyond_the_context_is_refused_with_the_numbers(base, prefix):
    long = example([1] * 124)
    assert heldout_loss(base, [long]).tokens == (123,)
    expected = (
        r"^prefix 5 \+ text 124 tokens exceed the model's context of 128; "
        r"lower data.max_tokens or shorten what stands before the text$"
    )
    with pytest.raises(EvaluationError, match=expected):
        heldout_loss(base, [long], prefix=prefix)
    with pytest.raises(EvaluationError, match=r"^text 129 tokens exceed"):
        heldout_loss(base, [example([1] * 129)])


def test_a_loss_that_is_no_number_is_refused(base, prefix):
    broken = dataclasses.replace(prefix, states=prefix.states.map(lambda tensor: tensor * torch.nan))
    expected = r"^the loss of a text is nan: the {} is damaged or the dtype too narrow; try model.dtype=float32$"
    delta = build_delta(base.model, MethodConfig(kind=Method.LORA), torch.Generator().manual_seed(0))
    with torch.no_grad():
        delta.numbers[1].fill_(torch.nan)
    lora = Prefix.from_states(
        PrefixStates.empty(prefix.states.geometry), base=prefix.card.base, deltas=[delta.materialise()]
    )
    for artefact in (broken, lora):
        with pytest.raises(EvaluationError, match=expected.format("artefact")):
            heldout_loss(base, EXAMPLES, prefix=artefact)
    with torch.no_grad():
        base.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(EvaluationError, match=expected.format("base model")):
        heldout_loss(base, EXAMPLES)
