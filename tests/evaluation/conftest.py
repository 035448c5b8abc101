"""A tiny base model, a prefix that clearly changes it, and prepared data about films."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from prefixkit.data import DataCounts, Example, LabelledText, PreparedData
from prefixkit.models import Base
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import BaseCard, Prefix, PrefixStates, SiteStates

GOOD = ["great", "wonderful", "excellent", "amazing", "superb", "perfect", "beautiful", "strong", "fun", "best"]
BAD = ["awful", "terrible", "boring", "worst", "weak", "dull", "poor", "bad", "waste", "hate"]
PLAIN = ["the", "film", "was", "a", "story", "with", "an", "actor", "and", "it", "is", "movie", "about", "people"]


@pytest.fixture
def base(make_tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast) -> Base:
    model = make_tiny_llama().double().requires_grad_(False)
    return Base("tiny", model, tiny_tokenizer, torch.float64, "none")


@pytest.fixture
def prefix(base: Base) -> Prefix:
    """Five virtual tokens per layer of random, large keys and values."""
    geometry = inspect_model(base.model).geometry
    generator = torch.Generator().manual_seed(1)
    sites = tuple(
        SiteStates(*(3 * torch.randn(site.kv_heads, 5, site.head_dim, generator=generator).double() for _ in "kv"))
        for site in geometry.sites
    )
    return Prefix.from_states(PrefixStates(geometry, sites), base=BaseCard(id="tiny"))


@pytest.fixture(scope="session")
def write_review() -> Callable[..., str]:
    """A function that writes a review of a label: plain words, some of them of that label."""

    def write(label: str, number: int, words: int = 20) -> str:
        generator = np.random.default_rng([number, len(label)])
        own = GOOD if label == "positive" else BAD
        chosen = [str(generator.choice(own if generator.random() < 0.3 else PLAIN)) for _ in range(words)]
        return " ".join(chosen)

    return write


@pytest.fixture
def data(base: Base, write_review: Callable[..., str]) -> PreparedData:
    """Small splits of such reviews, all different."""
    numbers = itertools.count()

    def examples(label: str, count: int, prompt: str = "review :") -> tuple[Example, ...]:
        made = []
        for _ in range(count):
            text = write_review(label, next(numbers), 12)
            read = tuple(base.tokenizer(prompt)["input_ids"])
            learned = tuple(base.tokenizer(text)["input_ids"])
            made.append(Example(prompt, text, read + learned, (-100,) * len(read) + learned))
        return tuple(made)

    def labelled(count: int) -> tuple[LabelledText, ...]:
        return tuple(
            LabelledText(write_review(label, next(numbers)), label)
            for _ in range(count)
            for label in ("negative", "positive")
        )

    counts = DataCounts(**dict.fromkeys(DataCounts.__dataclass_fields__, 0))
    return PreparedData(
        train=examples("positive", 20),
        validation=examples("positive", 4),
        test=examples("positive", 12),
        contrast=examples("negative", 10),
        judge_rows=labelled(40),
        judge_test_rows=labelled(20),
        kept_label="positive",
        classes=(),
        hash="",
        counts=counts,
    )
