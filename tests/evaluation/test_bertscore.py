"""BERTScore is what its definition says, token by token, on an encoder of random weights."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from prefixkit.config import EvaluationConfig, validate_recipe
from prefixkit.errors import ConfigError, ModelError, PrefixkitError
from prefixkit.evaluation import check_metrics
from prefixkit.evaluation.bertscore import BertScorer, check_scorer, load_scorer

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


def by_hand(folder: Path, text: str, reference: str, layer: int) -> float:
    """One text at a time, one pair of tokens after the other."""
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]

    def read(words: str) -> list[torch.Tensor]:
        ids = [2, *(names.index(word) for word in words.split()), 3]
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0].double()
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
    found = scorer.f1(texts, [[each] for each in references])
    expected = [by_hand(tiny_bert_dir, *pair, layer=2) for pair in zip(texts, references, strict=True)]
    assert found == pytest.approx(expected, abs=1e-6)
    first = load_scorer(EvaluationConfig(bertscore_model=str(tiny_bert_dir), bertscore_layer=1))
    assert first is not None
    assert first.f1(texts[:1], [references[:1]]) == pytest.approx([by_hand(tiny_bert_dir, texts[0], references[0], 1)])
    assert abs(first.f1(texts[:1], [references[:1]])[0] - found[0]) > 1e-3


def test_the_best_reference_counts_and_the_text_itself_is_the_best_there_is(scorer: BertScorer) -> None:
    text, other = "the cat sat on the mat", "a dog ran in the park"
    (far,) = scorer.f1([text], [[other]])
    assert far < 0.95
    assert scorer.f1([text], [[other, text]]) == pytest.approx([1.0])
    assert scorer.f1([other], [[text]]) == pytest.approx([far])  # it does not matter which of both was written


def test_an_empty_text_scores_nothing_and_a_long_one_is_cut(scorer: BertScorer) -> None:
    assert scorer.f1(["", " ", "cat"], [["cat"], ["cat"], [""]]) == [0, 0, 0]
    long = " ".join(WORDS * 4)
    assert scorer.f1([long], [[" ".join(WORDS[place % len(WORDS)] for place in range(30))]]) == pytest.approx([1.0])


def test_progress_reaches_the_end(scorer: BertScorer) -> None:
    told: list[tuple[int, int]] = []
    scorer.f1(
        [" ".join(WORDS[: 1 + place % 9]) for place in range(40)], [["cat"]] * 40, lambda *done: told.append(done)
    )
    assert told[-1] == (40, 40)


def refusal(**evaluation: object) -> PrefixkitError:
    recipe = validate_recipe({"data": {"format": "input_target"}, "evaluation": evaluation})

    def begin() -> None:
        check_metrics(recipe)
        load_scorer(recipe.evaluation)

    with pytest.raises(PrefixkitError) as caught:
        begin()
    return caught.value


def test_what_cannot_be_compared_is_refused(tiny_bert_dir: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    assert str(refusal(bertscore_model=str(tiny_bert_dir))) == (
        f"evaluation.bertscore_layer: which layer of {tiny_bert_dir} to compare is not known; give it, such as two "
        "thirds of its layers"
    )
    few = refusal(bertscore_model=str(tiny_bert_dir), bertscore_layer=4)
    assert str(few) == f"evaluation.bertscore_layer: {tiny_bert_dir} has 3 layers, got 4"
    causal = refusal(bertscore_model=str(tiny_llama_dir), bertscore_layer=1)
    assert str(causal) == (
        f"evaluation.bertscore_model: {tiny_llama_dir} is no encoder; give one, such as roberta-large"
    )
    assert isinstance(refusal(bertscore_model=str(tmp_path / "nothing"), bertscore_layer=1), ModelError)
    free_text = validate_recipe({"evaluation": {"bertscore_model": "roberta-large"}})
    with pytest.raises(ConfigError, match="compares answers with references, and nothing is answered here"):
        check_metrics(free_text)


def test_layers_of_well_known_models_are_known() -> None:
    for name, layer in (("roberta-large", 17), ("FacebookAI/roberta-large", 17), ("google-bert/bert-base-uncased", 9)):
        assert check_scorer(EvaluationConfig(bertscore_model=name)) == layer
    assert load_scorer(EvaluationConfig()) is None
