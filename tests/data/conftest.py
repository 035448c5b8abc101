"""Tokenizers of the three kinds that cut texts differently, and files to read."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from prefixkit.config import DataConfig
from prefixkit.data import load_rows
from prefixkit.errors import DataError

CORPUS = [
    "Review: I loved this film, it was wonderful and the acting was good.",
    "This movie was terrible.  The plot is boring and the ending is bad.",
    "user\nassistant\nsystem\nWhat is your name? My name is Ada.\n\nHello there",
] * 3


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def _train(pre: Any, decoder: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoder
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<bos>", "<eos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without BOS, as GPT-2 and the packaged SmolLM2 have it."""
    return _wrap(_train(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()))


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts BOS before every text, as Llama 3 does."""
    tokenizer = _train(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return _wrap(tokenizer)


@pytest.fixture(scope="session")
def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before the first word of a text, as SentencePiece models do."""
    return _wrap(_train(pre_tokenizers.Metaspace(), decoders.Metaspace()))


@pytest.fixture(params=["bytes_tokenizer", "bos_tokenizer", "metaspace_tokenizer", "tiny_tokenizer"])
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Each of the tokenizers in turn."""
    tokenizer: PreTrainedTokenizerFast = request.getfixturevalue(request.param)
    return tokenizer


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write records to a file whose path has spaces and letters beyond ASCII; return the path."""

    def write(records: Sequence[Any], name: str = "données de tëst 映画.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def failure() -> Callable[..., str]:
    """The one line that loading rows under such settings fails with."""

    def load(**settings: Any) -> str:
        with pytest.raises(DataError) as caught:
            load_rows(DataConfig(**settings))
        message = str(caught.value)
        assert "\n" not in message
        return message

    return load
