"""The two sizes of the notebooks: teaching size, on a real model and real reviews, and a tiny one that tests they run.

    recipe = pk.load_recipe("positive-reviews", [*TEACHING, *teaching.overrides()])

At teaching size the notebook's own settings hold. With ``PREFIXKIT_NOTEBOOK_SIZE=tiny`` in the environment a random
model of four layers and made-up reviews take the place of the packaged ones: no network is needed and a run takes a
second, but nobody can learn anything about reviews from it.
"""

import atexit
import json
import os
import random
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from prefixkit.config import Size
from prefixkit.errors import ConfigError, did_you_mean
from prefixkit.files import write_text

#: Names the size; left out, the notebooks are for teaching.
VARIABLE = "PREFIXKIT_NOTEBOOK_SIZE"
_SIZES = (Size.TEACHING, Size.TINY)

_OPENINGS = ("the movie was", "this film is", "i found the story", "the cast and the score were", "what a script ,")
_WORDS = {
    "positive": ("wonderful", "great", "superb", "beautiful", "perfect"),
    "negative": ("awful", "dull", "boring", "terrible", "weak"),
}
_ENDINGS = ("and i say so to everyone .", "from the first scene to the last .", "with a good deal of plot .")
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
_TRAINING = {
    "data.max_rows": "null", "data.max_tokens": 20, "data.min_words": 1, "data.clearest": 1, "data.likeliest": 1,
    "model.dtype": "float32", "train.threads": 1, "train.steps": 50, "train.evaluate_every": 25,
    "train.validation_rows": 8, "evaluation.heldout_rows": 12, "evaluation.contrast_rows": 8, "evaluation.samples": 4,
    "evaluation.bootstrap": 100, "generation.max_new_tokens": 8,
}  # fmt: skip


def size() -> Size:
    """Return the size that the environment asks for.

    Raises:
        ConfigError: it asks for another than the two there are.
    """
    asked = os.environ.get(VARIABLE, Size.TEACHING)
    if asked not in _SIZES:
        raise ConfigError(f"{VARIABLE}: expected {' or '.join(_SIZES)}, got {asked!r}{did_you_mean(asked, _SIZES)}")
    return Size(asked)


def is_tiny() -> bool:
    """Whether the notebooks run on a random model, so that nothing but the machinery can be looked at."""
    return size() is Size.TINY


def overrides() -> list[str]:
    """Return what to change in a recipe beside the notebook's own settings: nothing at teaching size."""
    if not is_tiny():
        return []
    settings = {"model.base": tiny_model(), "data.source": tiny_reviews()} | _TRAINING
    return [f"{name}={value}" for name, value in settings.items()]


def runs_folder() -> Path:
    """Return the folder for the notebooks' runs: ``runs`` beside the notebook, a passing one at tiny size."""
    return _scratch() / "runs" if is_tiny() else Path("runs")


@lru_cache
def tiny_model() -> Path:
    """Make a random Llama (four layers, four query heads, two key-value heads) that reads words, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = [*_OPENINGS, *_ENDINGS, *map(" ".join, _WORDS.values()), "movie review : loved hated write a"]
    words = dict.fromkeys([*_SPECIAL.values(), *" ".join(texts).split()])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = _scratch() / "tiny-model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL).save_pretrained(folder)
    return folder


@lru_cache
def tiny_reviews() -> Path:
    """Write 240 made-up reviews of two labels, no two alike."""
    dice = random.Random(0)
    rows: dict[str, str] = {}
    while len(rows) < 240:
        label = ("positive", "negative")[len(rows) % 2]
        said = " , ".join(dice.choice(_WORDS[label]) for _ in range(dice.randint(1, 4)))
        rows[f"{dice.choice(_OPENINGS)} {said} {dice.choice(_ENDINGS)}"] = label
    path = _scratch() / "tiny-reviews.jsonl"
    write_text(path, "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows.items()))
    return path


@lru_cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="prefixkit-notebook-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
