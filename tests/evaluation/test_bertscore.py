"""BERTScore is what its definition says, token by token, on an encoder of random weights."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from prefixkit.config import EvaluationConfig, validate_recipe
from prefixkit.errors import ConfigError, ModelError, PrefixkitError
from prefixkit.evaluation import check_metrics
from prefixkit.evaluation.bertscore import BertScorer, load_scorer

WORDS = "a the cat dog sat ran on in mat park near river".split()


@pytest.fixture(scope="module")
def tiny_bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT (3 layers, 24 positions) and a tokenizer of words that puts [CLS] and [SEP] around a text."""
    folder = tmp_path_factory.mktemp("encoders") / "tiny bert"
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = BertConfig(
            vocab_size=len(names), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=24, initializer_range=0.5,
        )  # fmt: skip
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(tiny_bert_dir: Path) -> BertScorer:
    found = load_scorer(EvaluationConfig(bertscore_model=str(tiny_bert_dir), bertscore_layer=2))
    assert found is not None
    return found


def quiet(*_: object) -> None:
    """Say nothing."""


def by_hand(folder: Path, text: str, reference: str, layer: int) -> float:
    """One text at a time, one pair of tokens after the other, in a model without the layers behind."""
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    del model.encoder.layer[layer:]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]

    def read(words: str) -> list[torch.Tensor]:
        ids = [2, *(names.index(word) for word in words.split()), 3]
        with torch.no_grad():
            states = model(torch.tensor([ids])).last_hidden_state[0].double()
        return list(states)

    def cosine(one: torch.Tensor, two: torch.Tensor) -> float:
        return float(one @ two / (one.norm() * two.norm()))

    own, other = read(text), read(reference)
    precision = [max(cosine(token, each) for each in other) for token in own[1:-1]]
    recall = [max(cosine(token, each) for each in own) for token in other[1:-1]]
    p, r = sum(precision) / len(precision), sum(recall) / len(recall)
    return 2 * p * r / (p + r)


def test_it_is_the_mean_of_the_nearest_cosines_both_ways(scorer: BertScorer, tiny_bert_dir: Path) -> None:
    texts = ["the cat sat on the mat", "a dog ran", "river"]
    references = ["the dog sat near the river", "a dog ran in a park near the river", "a cat"]
    found = scorer.f1(texts, [[each] for each in references], quiet)
    expected = [by_hand(tiny_bert_dir, *pair, layer=2) for pair in zip(texts, references, strict=True)]
    assert found == pytest.approx(expected, abs=1e-6)
    first = load_scorer(EvaluationConfig(bertscore_model=str(tiny_bert_dir), bertscore_layer=1))
    assert first is not None
    assert first.f1(texts[:1], [references[:1]], quiet) == pytest.approx(
        [by_hand(tiny_bert_dir, texts[0], references[0], 1)]
    )
    assert abs(first.f1(texts[:1], [references[:1]], quiet)[0] - found[0]) > 1e-3


def test_the_best_reference_counts_and_the_text_itself_is_the_best_there_is(scorer: BertScorer) -> None:
    text, other = "the cat sat on the mat", "a dog ran in the park"
    (far,) = scorer.f1([text], [[other]], quiet)
    assert far < 0.95
    assert scorer.f1([text], [[other, text]], quiet) == pytest.approx([1.0])
    assert scorer.f1([other], [[text]], quiet) == pytest.approx([far])  # it does not matter which of both was written


def test_an_empty_text_scores_nothing_and_a_long_one_is_cut(scorer: BertScorer) -> None:
    assert scorer.f1(["", " ", "cat"], [["cat"], ["cat"], [""]], quiet) == [0, 0, 0]
    long = " ".join(WORDS * 4)
    assert scorer.f1([long], [[" ".join(WORDS[place % len(WORDS)] for place in range(30))]], quiet) == pytest.approx(
        [1.0]
    )


def test_what_was_read_is_read_once_and_progress_reaches_the_end(scorer: BertScorer) -> None:
    told: list[tuple[int, int]] = []
    texts = [" ".join(WORDS[place % 5 : 6 + place % 7]) for place in range(40)]
    found = scorer.f1(texts, [["park cat"]] * 40, lambda *done: told.append(done))
    assert told[-1][0] == told[-1][1] > 32  # in two batches
    assert told == sorted(told)
    told.clear()
    assert scorer.f1(texts, [["park cat"]] * 40, lambda *done: told.append(done)) == found
    assert told == [(0, 0)]


def test_the_first_word_is_read_as_any_other(tmp_path: Path) -> None:
    """A byte-level tokenizer, as RoBERTa's, has a token for a word behind a space and another for one that is not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: place for place, name in enumerate(["<pad>", "<unk>", *alphabet, "Ġcat", "cat", "Ġsat", "sat"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = BertConfig(vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                            intermediate_size=24, max_position_embeddings=24, initializer_range=0.5)  # fmt: skip
        BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    scorer = load_scorer(EvaluationConfig(bertscore_model=str(tmp_path), bertscore_layer=1))
    assert scorer is not None
    scorer.f1(["cat sat"], [["sat"]], quiet)
    ids = {text: scorer._base.tokenizer(f" {text}")["input_ids"] for text in ("cat sat", "sat")}
    assert ids == {"cat sat": [vocabulary["Ġcat"], vocabulary["Ġsat"]], "sat": [vocabulary["Ġsat"]]}
    with torch.no_grad():
        alone = scorer._base.model(torch.tensor([ids["sat"]])).last_hidden_state[0]
    assert torch.allclose(scorer._known["sat"].directions, torch.nn.functional.normalize(alone, dim=-1), atol=1e-6)


def refusal(**evaluation: object) -> PrefixkitError:
    """What is said before training."""
    recipe = validate_recipe({"data": {"format": "input_target"}, "evaluation": evaluation})
    with pytest.raises(PrefixkitError) as caught:
        check_metrics(recipe)
    return caught.value


def test_what_cannot_be_compared_is_refused_before_training(
    tiny_bert_dir: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    few = refusal(bertscore_model=str(tiny_bert_dir), bertscore_layer=4)
    assert str(few) == f"evaluation.bertscore_layer: {tiny_bert_dir} has 3 layers, got 4"
    causal = refusal(bertscore_model=str(tiny_llama_dir), bertscore_layer=1)
    assert str(causal) == (
        f"evaluation.bertscore_model: {tiny_llama_dir} is no encoder; give one, such as roberta-large"
    )
    assert isinstance(refusal(bertscore_model=str(tmp_path / "nothing"), bertscore_layer=1), ModelError)


def test_where_nothing_is_answered_it_is_refused_and_where_nothing_is_written_it_does_not_matter() -> None:
    named = {"bertscore_model": "roberta-large", "bertscore_layer": 17}
    with pytest.raises(ConfigError, match="compares answers with references, and nothing is answered here; leave it"):
        check_metrics(validate_recipe({"evaluation": named}))
    check_metrics(validate_recipe({"evaluation": {**named, "samples": 0}}))


@pytest.mark.parametrize("half", [{"bertscore_model": "roberta-large"}, {"bertscore_layer": 17}])
def test_model_and_layer_go_together(half: dict[str, object]) -> None:
    with pytest.raises(
        ConfigError, match="bertscore_model and bertscore_layer go together, such as roberta-large and 17"
    ):
        validate_recipe({"evaluation": half})


def test_without_a_model_there_is_no_scorer() -> None:
    assert load_scorer(EvaluationConfig()) is None
