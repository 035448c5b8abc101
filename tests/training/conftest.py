"""A tiny run: a random Llama in float32, short reviews, everything on one thread."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from prefixkit.config import Recipe, validate_recipe
from prefixkit.data import PreparedData, prepare
from prefixkit.models import Base, load_base_model

WORDS = [
    "the",
    "film",
    "was",
    "wonderful",
    "great",
    "dull",
    "i",
    "loved",
    "it",
    "and",
    "story",
    "plot",
    "actors",
    "but",
    "not",
    "my",
    "best",
    "ending",
]


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 made-up reviews of different lengths, with labels."""
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    dice = random.Random(0)
    rows = (
        {"text": " ".join(dice.choices(WORDS, k=dice.randint(4, 16))), "label": dice.choice(["pos", "neg"])}
        for _ in range(150)
    )
    lines = (json.dumps(row) for row in rows)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def make_recipe(tiny_llama_dir: Path, reviews: Path) -> Callable[..., Recipe]:
    """A factory of tiny recipes; keywords are sections to merge in."""

    def make(**sections: dict[str, object]) -> Recipe:
        values: dict[str, dict[str, object]] = {
            "model": {"base": str(tiny_llama_dir), "dtype": "float32"},
            "prefix": {"num_virtual_tokens": 4, "dropout": 0.1},
            "data": {"source": str(reviews), "label_column": "label", "keep_label": "pos", "prompt": "the film",
                     "split": {"train": 0.6, "validation": 0.1, "test": 0.2, "judge": 0.1}},
            "train": {"steps": 8, "batch_size": 4, "checkpoint_every": 2, "evaluate_every": 4, "threads": 1},
            "evaluation": {"samples": 0, "judge": False, "heldout_rows": 8, "contrast_rows": 4, "bootstrap": 100},
        }  # fmt: skip
        for name, changes in sections.items():
            values[name] = values.get(name, {}) | changes
        return validate_recipe({"name": "tiny", **values})

    return make


@pytest.fixture
def load(tiny_llama_dir: Path) -> Callable[[Recipe], tuple[Base, PreparedData]]:
    """Load what a recipe names."""

    def load(recipe: Recipe) -> tuple[Base, PreparedData]:
        base = load_base_model(recipe.model.base, dtype=recipe.model.dtype)
        return base, prepare(recipe.data, base.tokenizer, prefix_tokens=4, context_tokens=base.context_tokens)

    return load
