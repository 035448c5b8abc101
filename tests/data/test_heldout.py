"""The texts a finished prefix is looked at with: the run's own test rows, at full length."""

import json

import pytest

from prefixkit.config import DataConfig
from prefixkit.data import heldout_texts, prepare
from prefixkit.errors import DataError

WORDS = "the film was wonderful great dull i loved it and story".split()


@pytest.fixture
def config(tmp_path):
    rows = [{"text": " ".join(WORDS[(i + k) % 11] for k in range(3 + i % 30)) + f" {i}", "label": "ab"[i % 2]}
            for i in range(300)]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return DataConfig(source=str(path), label_column="label", keep_label="a", prompt="movie :", min_words=6,
                      max_words=12, max_tokens=10)  # fmt: skip


def test_texts_are_test_rows_of_the_label_and_none_of_them_was_trained_on(config, tiny_tokenizer):
    found = heldout_texts(config, tiny_tokenizer, max_tokens=64, count=1000)
    prepared = prepare(config, tiny_tokenizer, prefix_tokens=0, context_tokens=None)
    texts = {example.text for example in found}
    assert len(texts) == len(found)
    assert {example.text for example in prepared.test} < texts  # and longer ones
    assert not texts & {example.text for example in (*prepared.train, *prepared.validation, *prepared.contrast)}
    assert all(int(text.split()[-1]) % 2 == 0 for text in texts)
    assert min(len(text.split()) for text in texts) >= 6
    every = heldout_texts(config.model_copy(update={"min_words": 1}), tiny_tokenizer, max_tokens=64, count=1000)
    assert texts < {example.text for example in every}
    assert max(len(text.split()) for text in texts) > 12


def test_the_longest_come_first_and_whole_ones_in_the_order_of_the_source(config, tiny_tokenizer):
    found = heldout_texts(config, tiny_tokenizer, max_tokens=20, count=5)
    lengths = [len(example.input_ids) for example in found]
    assert lengths == [20] * 5
    numbers = [int(example.text.split()[-1]) for example in found]
    assert numbers == sorted(numbers)
    everything = heldout_texts(config, tiny_tokenizer, max_tokens=20, count=1000)
    assert everything[:5] == found
    assert sorted((len(e.input_ids) for e in everything), reverse=True) == [len(e.input_ids) for e in everything]


def test_without_a_held_out_row_the_source_is_named(config, tiny_tokenizer):
    none = config.model_copy(update={"min_words": 99})
    with pytest.raises(DataError, match="none of 300 rows is a held-out text of this recipe; check data.split"):
        heldout_texts(none, tiny_tokenizer, max_tokens=9, count=1)


def test_a_pair_is_as_long_as_the_longer_of_its_texts(tmp_path, tiny_tokenizer):
    rows = [{"input": " ".join(WORDS[: 1 + i % 7]) + f" {i}", "target": " ".join(WORDS[: 1 + i // 9]) + f" {i}"}
            for i in range(80)]  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    config = DataConfig(source=str(path), format="input_target", max_tokens=4)
    found = heldout_texts(config, tiny_tokenizer, max_tokens=9, count=1000, start=0)
    lengths = [max(len(example.source_ids), len(example.input_ids)) for example in found]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) == 9
    assert all(example.input_ids[0] == 0 for example in found)
    assert any(len(example.source_ids) > len(example.input_ids) for example in found)
