"""Prefixes that PEFT trained with a head for labels: the same logits here, and back again; the rest is refused."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from prefixkit import Base, Prefix, attach, classify
from prefixkit.config import Pooling, validate_recipe
from prefixkit.data import Example
from prefixkit.errors import ArtefactError, ConfigError, DataError, EvaluationError, ExportError
from prefixkit.evaluation.labels import label_losses
from prefixkit.export import from_peft, to_peft
from prefixkit.models.reading import last_hidden_state
from prefixkit.peft import PeftModel as OurPeftModel
from prefixkit.peft import PrefixTuningConfig as OurConfig
from prefixkit.prefix import Head, HeadKind

MakeModel = Callable[..., PreTrainedModel]
Train = Callable[[PreTrainedModel, str], tuple[PeftModel, Path]]
CLASSES = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}
LABELS = 3


def with_head(model: PreTrainedModel, task: str) -> PreTrainedModel:
    """transformers' own class for a task, its layers those of a causal language model, its head random."""
    config = model.config.__class__.from_dict(model.config.to_dict() | {"num_labels": LABELS})
    with torch.random.fork_rng():
        torch.manual_seed(4)
        other = CLASSES[task].from_config(config).to(model.dtype)
    missing = other.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert all(name.startswith(("score.", "classifier.")) for name in missing)
    return other.eval().requires_grad_(False)


@pytest.fixture
def train(ids: Tensor, tmp_path: Path) -> Train:
    """Let PEFT train prefix and head for a few steps and save them; returns its model and the folder."""

    def run(model: PreTrainedModel, task: str) -> tuple[PeftModel, Path]:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            tuned = get_peft_model(model, PrefixTuningConfig(task_type=task, num_virtual_tokens=5))
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.05)
        labels = torch.tensor([0, 1, 2]) if task == "SEQ_CLS" else ids % LABELS
        for _ in range(3):
            tuned(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it looks for the base model's config on the hub
            tuned.eval().save_pretrained(tmp_path / "theirs")
        return tuned, tmp_path / "theirs"

    return run


def head_logits(model: PreTrainedModel, prefix: Prefix, ids: Tensor, mask: Tensor) -> Tensor:
    assert prefix.head is not None
    with attach(model, prefix), torch.no_grad():
        return prefix.head(last_hidden_state(model, {"input_ids": ids, "attention_mask": mask}))  # [b, t, c]


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("peft_family", ["gpt2", "llama", "qwen2", "gemma", "gpt-neox"])
def test_what_peft_learned_says_the_same_here_and_in_peft_again(
    peft_family: str,
    task: str,
    ids: Tensor,
    make_model: MakeModel,
    train: Train,
    tmp_path: Path,
) -> None:
    model = make_model(peft_family)
    tuned, folder = train(with_head(model, task), task)
    ids, mask = ids.clone(), torch.ones_like(ids)
    ids[1, -2:], mask[1, -2:] = model.config.pad_token_id, 0
    with torch.no_grad():
        theirs = tuned(input_ids=ids, attention_mask=mask).logits
    prefix = from_peft(folder, model)
    found = head_logits(model, prefix, ids, mask)
    if task == "SEQ_CLS":
        found = found[torch.arange(len(ids)), mask.sum(1) - 1]
        assert prefix.head is not None
        assert prefix.head.pooling is Pooling.LAST
    else:
        found, theirs = found[mask.bool()], theirs[mask.bool()]
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-10)
    prefix.save(tmp_path / "artefact")
    again = Prefix.load(tmp_path / "artefact")
    to_peft(again, tmp_path / "ours", model)
    ours, back = (load_file(each / "adapter_model.safetensors") for each in (tmp_path / "ours", folder))
    assert ours.keys() == back.keys()
    said = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert said["modules_to_save"] == ["score", "classifier"]
    assert all(torch.equal(ours[key], back[key]) for key in back)
    reloaded = PeftModel.from_pretrained(with_head(model, task), tmp_path / "ours").eval()
    with torch.no_grad():
        logits = reloaded(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(logits if task == "SEQ_CLS" else logits[mask.bool()], theirs)


@pytest.mark.parametrize("closed", [False, True], ids=["plain", "an end of text is put behind it"])
@pytest.mark.parametrize("padding", ["<pad>", "<eos>"])
def test_classify_reads_a_text_as_peft_does(
    padding: str, closed: bool, make_model: MakeModel, train: Train, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Nothing is put behind the text, and the label comes from its last token that is not the padding token."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    if closed:
        ends = [("<eos>", tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=ends)
    pad = tokenizer.convert_tokens_to_ids(padding)
    model = make_model("llama", vocab_size=len(tokenizer), dtype=torch.float32, pad_token_id=pad)
    tuned, folder = train(with_head(model, "SEQ_CLS"), "SEQ_CLS")
    prefix = from_peft(folder, model, labels=["bad", "fair", "good"])
    texts = ["the film was", "i love this plot", "it was good <eos>", "<eos>"]
    base = Base("tiny", model, tokenizer, torch.float32, "none")
    found = classify(base, texts, prefix)
    for text, said in zip(texts, found, strict=True):
        with torch.no_grad():
            expected = tuned(**tokenizer([text], return_tensors="pt", return_token_type_ids=False)).logits[0]
        assert list(said.probabilities) == ["bad", "fair", "good"]
        assert list(said.probabilities.values()) == pytest.approx(expected.softmax(-1).tolist(), abs=1e-6)
    own = Head(HeadKind.SEQUENCE, ("no", "yes"), torch.ones(2, 32), torch.zeros(2))
    trained = Prefix.from_states(prefix.states, base=prefix.card.base, head=own)
    mixed = classify(base, texts[:2], [prefix, trained])  # each text as its own head reads it
    assert mixed[0].probabilities == pytest.approx(found[0].probabilities)
    assert mixed[1].probabilities == pytest.approx(classify(base, texts[1:2], trained)[0].probabilities)


def test_where_it_cannot_be_known_what_a_head_looks_at_the_text_is_refused(
    make_model: MakeModel, train: Train, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    model = make_model("llama", vocab_size=len(tokenizer), dtype=torch.float32)
    _, folder = train(with_head(model, "SEQ_CLS"), "SEQ_CLS")
    prefix = from_peft(folder, model)
    model.config.pad_token_id = tokenizer.pad_token = None
    base = Base("tiny", model, tokenizer, torch.float32, "none")
    assert len(classify(base, ["the film was"], prefix)) == 1
    with pytest.raises(DataError, match="a text ends in the end-of-text token, and the base model names no padding"):
        classify(base, ["the film was <eos>"], prefix)


def test_an_imported_head_is_not_measured_on_texts_that_end_otherwise(
    make_model: MakeModel, train: Train, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model("llama", vocab_size=len(tiny_tokenizer), dtype=torch.float32)
    _, folder = train(with_head(model, "SEQ_CLS"), "SEQ_CLS")
    base = Base("tiny", model, tiny_tokenizer, torch.float32, "none")
    with pytest.raises(EvaluationError, match="this head was imported from PEFT and reads a text's own last token"):
        label_losses(base, [Example("", "a", (3, 4), (-100, 1))], from_peft(folder, model))


def test_a_layer_of_another_kind_of_head_is_no_head(make_model: MakeModel, ids: Tensor, tmp_path: Path) -> None:
    """BERT's own classes read its pooler, which PEFT does not save, whatever they call the layer behind."""
    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                        is_decoder=True, num_labels=3)  # fmt: skip
    model = BertForSequenceClassification(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).save_pretrained(tmp_path)
    with pytest.raises(ArtefactError, match="classifier cannot be imported as its head: BertForSequenceClassification"):
        from_peft(tmp_path, BertLMHeadModel(config).eval())


def test_the_width_of_a_head_is_that_of_what_it_reads(make_model: MakeModel, train: Train, ids: Tensor) -> None:
    """OPT-350m's states are projected to another width before its head reads them."""
    model = make_model("opt", word_embed_proj_dim=16)
    tuned, folder = train(with_head(model, "SEQ_CLS"), "SEQ_CLS")
    found = head_logits(model, from_peft(folder, model), ids, torch.ones_like(ids))[:, -1]
    with torch.no_grad():
        torch.testing.assert_close(found, tuned(input_ids=ids).logits, rtol=0, atol=1e-10)


def test_a_model_with_a_head_of_its_own_is_not_what_a_prefix_is_bound_to(
    make_model: MakeModel, train: Train, tmp_path: Path
) -> None:
    model = make_model("llama")
    classifier = with_head(model, "SEQ_CLS")
    _, folder = train(classifier, "SEQ_CLS")
    message = r"LlamaForSequenceClassification: has a head of its own \(score\), to which a prefix would be bound; give"
    with pytest.raises(ArtefactError, match=message):
        from_peft(folder, with_head(model, "SEQ_CLS"))
    with pytest.raises(ExportError, match=message):
        to_peft(from_peft(folder, model), tmp_path / "out", with_head(model, "SEQ_CLS"))


def test_a_prefix_for_features_is_a_prefix(make_model: MakeModel, ids: Tensor, tmp_path: Path) -> None:
    model = make_model("gpt2")
    bare = AutoModel.from_config(model.config).double().eval()
    bare.load_state_dict(model.transformer.state_dict())
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        tuned = get_peft_model(bare, PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=5)).eval()
        tuned.save_pretrained(tmp_path)
    with torch.no_grad():
        theirs = tuned(input_ids=ids).last_hidden_state
        with attach(model, from_peft(tmp_path, model)):
            ours = last_hidden_state(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_labels_are_named_by_the_caller_the_model_or_by_number(make_model: MakeModel, train: Train) -> None:
    model = make_model("gpt2")
    _, folder = train(with_head(model, "TOKEN_CLS"), "TOKEN_CLS")

    def labels(given: Any = None) -> tuple[str, ...]:
        head = from_peft(folder, model, labels=given).head
        assert head is not None
        return head.labels

    assert labels() == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert labels(["O", "B", "I"]) == ("O", "B", "I")
    for wrong in (["O", "B"], ["O", "B", "B"], ["O", "", "B"], "abc"):
        with pytest.raises(ArtefactError, match="labels: expected a list of 3 different names, got "):
            labels(wrong)
    model.config.id2label = {0: "no", 1: "yes", 2: "maybe"}
    assert labels() == ("no", "yes", "maybe")
    model.config.id2label = {0: "no", 1: "no", 2: "maybe"}
    assert labels() == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_labels_without_a_head_are_refused(
    make_model: MakeModel, make_prefix: Callable[..., Prefix], tmp_path: Path
) -> None:
    model = make_model("gpt2")
    to_peft(make_prefix(model), tmp_path, model)
    with pytest.raises(ArtefactError, match="labels: .* has no head whose logits they could name; leave them out"):
        from_peft(tmp_path, model, labels=["a", "b"])


def test_what_would_differ_or_be_lost_is_refused(make_model: MakeModel, train: Train, tmp_path: Path) -> None:
    model = make_model("llama")
    _, folder = train(with_head(model, "SEQ_CLS"), "SEQ_CLS")
    with pytest.raises(ArtefactError, match="its prefix learned labels and has a head, which would be lost here"):
        OurPeftModel.from_pretrained(model, folder)
    with pytest.raises(ArtefactError, match="its prefix learned labels and has a head, which would be lost here"):
        OurConfig.from_pretrained(folder)
    with pytest.raises(ConfigError, match="head.pooling last is what heads imported from PEFT read"):
        validate_recipe({"head": {"pooling": "last"}})
    path = folder / "adapter_model.safetensors"
    whole = load_file(path)
    weight = whole["base_model.score.weight"]
    for change, message in (
        (
            {"base_model.score.weight": weight[:, :-1]},
            "its head reads 31 numbers, this model gives 32; load its",
        ),
        ({"base_model.score.weight": weight[:1]}, r"its head says one number \(a regression\), no label"),
        ({"base_model.score.weight": weight[0]}, r"its head is no linear layer: shape \[32\]"),
        ({"base_model.score.weight": weight / 0}, "its head holds NaN, infinite numbers"),
        ({"base_model.score.weight": weight.to(torch.float8_e4m3fn)}, "its head holds NaN, infinite numbers"),
        ({"base_model.score.bias": weight[:, 0] / 0}, "its head holds NaN, infinite numbers"),
        ({"base_model.score.bias": weight[:, 0].float()}, "weight and bias of its head have different number formats"),
        ({"base_model.score.bias": weight[:, 0]}, "score is not the head of transformers' class of this model, score"),
        ({"base_model.classifier.weight": weight}, "expected the weights of one linear layer, score or classifier, as"),
        ({"base_model.score.dense.weight": weight}, "also holds base_model.score.dense.weight, a weight of the base"),
    ):
        save_file({key: tensor.contiguous().clone() for key, tensor in (whole | change).items()}, path)
        with pytest.raises(ArtefactError, match=message):
            from_peft(folder, model)


@pytest.mark.parametrize(
    ("head", "peft_family", "message"),
    [
        (Head(HeadKind.SEQUENCE, ("a", "b"), torch.ones(2, 32), torch.zeros(2)), "llama", "from the token behind it"),
        (
            Head(HeadKind.SEQUENCE, ("a", "b"), torch.ones(2, 32), torch.zeros(2), Pooling.MEAN),
            "llama",
            "from the mean of its tokens",
        ),
        (
            Head(HeadKind.SEQUENCE, ("a", "b"), torch.ones(2, 32), torch.ones(2), Pooling.LAST),
            "llama",
            "this head's bias: transformers' own head of this model, score, has none",
        ),
        (
            Head(HeadKind.TOKEN, ("a", "b"), torch.ones(2, 31), torch.ones(2)),
            "llama",
            "LlamaForTokenClassification has no such linear layer right behind the base model",
        ),
        (
            Head(HeadKind.TOKEN, ("a", "b"), torch.ones(2, 32), torch.ones(2)),
            "cohere",
            "transformers has no class of CohereForCausalLM's family with one for words",
        ),
    ],
)
def test_heads_the_format_cannot_say_are_refused_and_nothing_is_written(
    head: Head,
    peft_family: str,
    message: str,
    make_model: MakeModel,
    make_prefix: Callable[..., Prefix],
    tmp_path: Path,
) -> None:
    model = make_model(peft_family)
    with pytest.raises(ExportError, match=message):
        to_peft(make_prefix(model, head=head), tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_prefixes_of_encoders_are_refused_by_name(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    model = BertForSequenceClassification(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
        tuned.save_pretrained(tmp_path)
    with pytest.raises(ArtefactError, match="BertModel is none: PEFT moves its text behind the prefix, here text"):
        from_peft(tmp_path, AutoModel.from_config(config))
