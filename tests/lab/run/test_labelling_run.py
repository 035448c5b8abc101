"""A run that learns labels, on an encoder and on a decoder-only model, through the same commands."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from prefixkit.classification import classify
from prefixkit.config import Recipe, load_recipe, validate_recipe
from prefixkit.data import heldout_texts
from prefixkit.errors import ArtefactError, ConfigError, DataError, EvaluationError, UnsupportedModelError
from prefixkit.evaluation.attention_mass import measure_mass
from prefixkit.files import read_json
from prefixkit.lab.diagnosis.record import read_diagnosis
from prefixkit.lab.diagnosis.run import diagnose_run
from prefixkit.lab.run.loaded_run import load_run
from prefixkit.lab.run.run import Run, evaluate_run, train_run
from prefixkit.prefix import HeadKind, Prefix
from processes import prefixkit

from ..conftest import TrainOnce, quiet

GOOD, BAD = ["great", "wonderful", "excellent", "superb"], ["awful", "terrible", "boring", "dull"]
PLAIN = "the film was a story with an actor and it is movie about people".split()


@pytest.fixture(scope="module")
def bert_dir(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """A tiny BERT with a masked language model's head, which nothing here reads."""
    folder = tmp_path_factory.mktemp("base") / "tiny bert"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_llama_dir)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                            intermediate_size=32, max_position_embeddings=64, initializer_range=0.3)  # fmt: skip
        BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, *, tags: bool) -> Path:
    """Reviews whose label is the kind of one word in them; as tags, that word is marked."""
    lines = []
    for number in range(240):
        good = number % 2 == 0
        words = [PLAIN[(number * 7 + place * 3) % len(PLAIN)] for place in range(3 + number % 5)]
        at = number % (len(words) + 1)
        words.insert(at, (GOOD if good else BAD)[number % 4])
        words += [f"x{number}"]
        marks = ["O"] * len(words)
        marks[at] = "B-GOOD" if good else "B-BAD"
        row = {"text": words, "label": marks} if tags else {"text": " ".join(words), "label": "ab"[good]}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def make_recipe(base: Path, source: Path, form: str, **sections: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {
        "name": "labels",
        "model": {"base": str(base), "dtype": "float32"},
        "prefix": {"num_virtual_tokens": 4},
        "data": {"source": str(source), "format": form, "label_column": "label",
                 "split": {"train": 0.6, "validation": 0.2, "test": 0.2, "judge": 0}},
        "train": {"steps": 60, "batch_size": 16, "evaluate_every": 20, "checkpoint_every": 20, "threads": 1,
                  "learning_rate": 0.05},
        "head": {"learning_rate": 0.02, "dropout": 0.0},
        "evaluation": {"heldout_rows": 100, "bootstrap": 100},
    }  # fmt: skip
    for name, changes in sections.items():
        values[name] = values.get(name, {}) | changes
    return validate_recipe(values)


@pytest.fixture
def one_step_run(bert_dir: Path, inputs: Path, tmp_path: Path, train_once: TrainOnce) -> Run:
    """A run that learned next to nothing, of whole texts."""
    rows = write_rows(inputs / "rows.jsonl", tags=False)
    return train_once(make_recipe(bert_dir, rows, "classes", train={"steps": 1}), tmp_path / "run")


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_run_learns_to_tell_texts_apart(
    kind: str, bert_dir: Path, tiny_llama_dir: Path, inputs: Path, tmp_path: Path
) -> None:
    base_dir = bert_dir if kind == "bert" else tiny_llama_dir
    recipe = make_recipe(base_dir, write_rows(inputs / "rows.jsonl", tags=False), "classes")
    run = train_run(recipe, tmp_path / "run", report=quiet)
    scores = read_json(run.folder / "scores.json")
    assert scores["accuracy"] > 0.85 > scores["majority.accuracy"]
    assert scores["heldout_nll"] < 0.5 < scores["majority.heldout_nll"]
    assert set(scores["intervals"]) >= {"accuracy", "head.accuracy", "words.accuracy", "macro_f1"}
    record = read_json(run.folder / "run.json")
    assert record["base_weights_hash"]["before"] == record["base_weights_hash"]["after"]
    lines = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()]
    share = sum(line["labels"] == line["predicted"] for line in lines) / len(lines)
    assert share == pytest.approx(scores["accuracy"])
    assert not (run.folder / "samples.jsonl").exists()
    base, prefix, _ = load_run(run.folder)
    assert prefix.head is not None
    assert prefix.card.training is not None
    held = sum(4 * 2 * site.kv_heads * site.head_dim for site in prefix.states.geometry.sites)
    assert prefix.card.training.trained_parameters == held + 2 * 32 + 2
    found = classify(base, [line["text"] for line in lines], prefix)
    assert [each.label for each in found] == [line["predicted"][0] for line in lines]
    assert load_run(run.folder).classify([line["text"] for line in lines]) == found
    with pytest.raises(ArtefactError, match=r"learned labels, and writes no text; classify\(\) gives them"):
        load_run(run.folder).generate(["a film"])
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    for words in ("Accuracy", "What it takes for what", "head alone", "bag of words", "commonest label",
                  "nats per label"):  # fmt: skip
        assert words in page
    assert "nats per token; lower" not in page


def test_a_run_learns_to_tag_words(bert_dir: Path, inputs: Path, tmp_path: Path) -> None:
    source = write_rows(inputs / "tags.jsonl", tags=True)
    recipe = make_recipe(bert_dir, source, "tags", train={"steps": 200, "patience": None}, head={"learning_rate": 0.05})
    run = train_run(recipe, tmp_path / "run", report=quiet)
    scores = read_json(run.folder / "scores.json")
    assert scores["entity_f1"] > scores["majority.entity_f1"] + 0.4
    assert scores["accuracy"] > scores["majority.accuracy"]
    assert run.prefix.head is not None
    assert run.prefix.head.kind is HeadKind.TOKEN
    assert run.prefix.head.labels == ("B-BAD", "B-GOOD", "O")
    line = json.loads((run.folder / "predictions.jsonl").read_text().splitlines()[0])
    pairs = zip(line["text"].split(), line["predicted"], strict=True)
    assert prefixkit("classify", str(run.folder), line["text"]).stdout.split() == [
        f"{word}/{label}" for word, label in pairs
    ]
    assert line["words"] == line["text"].split()
    surest = re.findall(r"· “(\S+)” is <b>([\w-]+)</b>, was taken for", (run.folder / "report.html").read_text("utf-8"))
    assert surest
    for word, label in surest:
        assert label == ("B-GOOD" if word in GOOD else "B-BAD" if word in BAD else "O")


def test_a_finished_run_is_measured_again_and_resumed(
    bert_dir: Path, inputs: Path, tmp_path: Path, train_once: TrainOnce
) -> None:
    recipe = make_recipe(bert_dir, write_rows(inputs / "rows.jsonl", tags=False), "classes", train={"steps": 4})
    run = train_once(recipe, tmp_path / "run")
    before = (run.folder / "scores.json").read_text()
    changed = make_recipe(bert_dir, inputs / "rows.jsonl", "classes", train={"steps": 4},
                          evaluation={"heldout_rows": 7})  # fmt: skip
    evaluate_run(run.folder, changed, report=quiet)
    assert len((run.folder / "predictions.jsonl").read_text().splitlines()) == 7
    evaluate_run(run.folder, recipe, report=quiet)
    assert (run.folder / "scores.json").read_text() == before
    assert train_run(recipe, run.folder, resume=True, report=quiet).prefix.card.content_hash == (
        run.prefix.card.content_hash
    )
    other = make_recipe(bert_dir, inputs / "rows.jsonl", "classes", train={"steps": 4}, head={"dropout": 0.5})
    with pytest.raises(ConfigError, match=r"^head.dropout: the run was started with 0.0, not 0.5; "):
        train_run(other, run.folder, resume=True, report=quiet)


def test_the_commands_know_what_a_run_learned(
    bert_dir: Path, inputs: Path, tmp_path: Path, train_once: TrainOnce
) -> None:
    recipe = make_recipe(bert_dir, write_rows(inputs / "rows.jsonl", tags=False), "classes", train={"steps": 40})
    run = train_once(recipe, tmp_path / "run")
    folder = str(run.folder)
    lines = [json.loads(line) for line in prefixkit("classify", folder, "--json", given=b"great film\n\nawful film\n")
             .stdout.splitlines()]  # fmt: skip
    assert [line["text"] for line in lines] == ["great film", "awful film"]
    assert all(sum(line["probabilities"].values()) == pytest.approx(1) for line in lines)
    assert "head                   sequence, reads token, 2 labels: a, b" in prefixkit("show", folder).stdout
    again = prefixkit("train", str(run.folder / "recipe.yaml"), "--resume", "--out", folder)
    assert f"{run.scores['accuracy']:.1%}" in again.stdout
    refused = {
        ("generate", folder): "this artefact learned labels, and writes no text; see `prefixkit classify`",
        ("export", "peft", folder, str(tmp_path / "out")): "PEFT's format cannot say encoder_self prefixes",
    }
    for arguments, message in refused.items():
        done = prefixkit(*arguments)
        assert done.returncode == 1
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "form"), [("bert", "classes"), ("llama", "classes"), pytest.param("bert", "tags", marks=pytest.mark.slow)]
)
def test_a_run_that_learned_labels_is_diagnosed(
    kind: str, form: str, bert_dir: Path, tiny_llama_dir: Path, inputs: Path, tmp_path: Path, train_once: TrainOnce
) -> None:
    base_dir = bert_dir if kind == "bert" else tiny_llama_dir
    source = write_rows(inputs / ("tags.jsonl" if form == "tags" else "rows.jsonl"), tags=form == "tags")
    run = train_once(make_recipe(base_dir, source, form, train={"steps": 4}), tmp_path / "run")
    told = prefixkit("diagnose", str(run.folder), "--rows", "6")
    assert told.returncode == 0, told.stderr
    found = read_diagnosis(run.folder / "diagnosis.json")
    (place,) = found.placements
    assert (found.texts, found.without) == (6, ())
    assert place.placement == ("encoder_self" if kind == "bert" else "decoder_self")
    base, prefix, recipe = load_run(run.folder)
    texts = heldout_texts(recipe.data, base.tokenizer, max_tokens=60, count=6, reads_both_ways=kind == "bert")
    assert all(example.input_ids[-1] == 2 and not example.loss_tokens for example in texts)  # whole, and closed
    (measured,) = measure_mass(base, prefix, texts, within=recipe.data.max_tokens).placements
    assert [layer.share for layer in place.layers] == pytest.approx([site.mean for site in measured.sites], rel=1e-4)
    if kind == "bert":
        assert [point.first for point in place.points] == [3, 4, 8, len(texts[2].input_ids)]
    assert "Its share" in told.stdout
    assert ":" not in told.stdout.splitlines()[0]  # one placement needs no name
    assert (run.folder / "diagnosis.html").is_file()


def test_too_few_tokens_for_a_text_are_refused(one_step_run: Run) -> None:
    with pytest.raises(EvaluationError, match="--tokens: 2 leaves no room for text beside 2 special tokens; give more"):
        diagnose_run(one_step_run.folder, tokens=2, report=quiet)
    with pytest.raises(EvaluationError, match="--tokens: prefix 0 [+] text 65 exceed the model's context of 64; give"):
        diagnose_run(one_step_run.folder, tokens=65, report=quiet)


@pytest.mark.parametrize(
    ("given", "message"),
    [(b"\xff\xfe film", "stdin: not UTF-8 text; convert it first"),
     (b"\n  \n", "no texts: give them as arguments, or one per line on stdin")],
)  # fmt: skip
def test_what_cannot_be_read_from_stdin_is_said_in_one_line(one_step_run: Run, given: bytes, message: str) -> None:
    done = prefixkit("classify", str(one_step_run.folder), given=given)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == f"error: {message}"


def test_lines_end_where_people_end_them(one_step_run: Run) -> None:
    given = "great\u2028film\r\nawful\x0cfilm\n".encode()
    out = prefixkit("classify", str(one_step_run.folder), "--json", given=given).stdout
    assert [json.loads(line)["text"] for line in out.split("\n") if line] == ["great\u2028film", "awful\x0cfilm"]


def test_a_prefix_that_learned_text_is_not_asked_for_labels(run: Run) -> None:
    done = prefixkit("classify", str(run.folder), "the film")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("this artefact learned text, and has no head; see `prefixkit generate`")


def test_an_encoder_is_not_asked_to_write(bert_dir: Path, recipe: Recipe, tmp_path: Path) -> None:
    writing = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": str(bert_dir)})})
    with pytest.raises(UnsupportedModelError, match="bert reads both ways and writes no text; give a model that"):
        train_run(writing, tmp_path / "run", report=quiet)
    assert not (tmp_path / "run").exists()


def test_one_label_cannot_be_told_apart(bert_dir: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"the film {n}", "label": "a"}) for n in range(50)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(DataError, match=r"^data.label_column: every row says 'a'; there must be two labels to tell"):
        train_run(make_recipe(bert_dir, tmp_path / "rows.jsonl", "classes"), tmp_path / "run", report=quiet)


def test_the_shipped_recipe_trains_on_any_encoder(bert_dir: Path, inputs: Path, tmp_path: Path) -> None:
    recipe = load_recipe("review-sentiment", [
        f"model.base={bert_dir}", f"data.source={write_rows(tmp_path / 'rows.jsonl', tags=False)}", "train.steps=3",
        "data.max_tokens=20", "data.split.train=0.7", "data.split.validation=0.1", "data.split.test=0.2",
    ])  # fmt: skip
    run = train_run(recipe, tmp_path / "run", report=quiet)
    assert Prefix.load(run.folder).head is not None
    assert "accuracy" in run.scores
