"""Fluency: the generated text, given its prompt, under the bare model."""

import copy
import dataclasses

import pytest
import torch

from prefixkit.errors import EvaluationError
from prefixkit.evaluation import fluency_losses


def slow_nats(base, prompt, text):
    """Log-probabilities of the words of the text behind those of the prompt, in float64."""
    read = base.tokenizer(prompt)["input_ids"] or [base.tokenizer.bos_token_id]
    ids = read + base.tokenizer(text)["input_ids"]
    with torch.no_grad():
        logits = base.model(torch.tensor([ids])).logits[0].log_softmax(1)
    return -sum(logits[t - 1, ids[t]].item() for t in range(len(read), len(ids)))


def test_only_the_text_is_scored_and_only_behind_its_own_prompt(base):
    prompts = ["review :", "the film was", "", "review :"]
    texts = [" it is great fun", " not good .", "a story", " bad"]
    losses = fluency_losses(base, prompts, texts)
    assert losses.tokens == (4, 3, 2, 1)
    expected = [slow_nats(base, *pair) for pair in zip(prompts, texts, strict=True)]
    assert losses.nats == pytest.approx(expected, abs=1e-10)


def test_empty_texts_cost_nothing_and_keep_their_place(base):
    losses = fluency_losses(base, ["review :", "", "review :"], ["", "", " great"])
    assert losses.tokens == (0, 0, 1)
    assert losses.nats[:2] == (0.0, 0.0)
    assert losses.nats[2] > 0


def test_without_bos_the_first_token_after_an_empty_prompt_is_not_scored(base):
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.bos_token = None
    losses = fluency_losses(dataclasses.replace(base, tokenizer=tokenizer), ["", ""], ["a story", ""])
    assert losses.tokens == (1, 0)


def test_only_empty_texts_are_refused(base):
    with pytest.raises(EvaluationError, match=r"^all 2 generated texts are empty; there is nothing to score$"):
        fluency_losses(base, ["a", "b"], ["", ""])


def test_a_text_that_is_longer_read_than_written_is_scored_as_far_as_it_fits(base):
    limit = base.context_tokens
    losses = fluency_losses(base, ["review :"], ["film " * (limit + 5)])
    assert losses.tokens == (limit - 2,)
