"""A run on an encoder-decoder, from pairs to scores, through the same commands."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from prefixkit.config import Format, Placement, Recipe, load_recipe, validate_recipe
from prefixkit.data import Collator, build_examples, heldout_texts
from prefixkit.data.rows import Row
from prefixkit.errors import DataError, EvaluationError, ModelError
from prefixkit.evaluation import heldout_loss
from prefixkit.evaluation.attention_mass import measure_mass
from prefixkit.evaluation.fluency import fluency_losses
from prefixkit.evaluation.systems import System, SystemName
from prefixkit.files import read_json
from prefixkit.generation import encode_prompts, generate_texts
from prefixkit.injection import attach
from prefixkit.lab.diagnosis.findings import lines
from prefixkit.lab.diagnosis.page import render_diagnosis
from prefixkit.lab.diagnosis.record import read_diagnosis
from prefixkit.lab.diagnosis.run import diagnose_run
from prefixkit.lab.run.loaded_run import load_run
from prefixkit.lab.run.run import Run, train_run
from prefixkit.models import Base, load_base_model
from prefixkit.models.specials import opening_ids
from prefixkit.prefix import Prefix
from processes import prefixkit

from ..conftest import quiet

NAMES = ["film", "story", "plot", "cast", "music", "score", "actor", "scene"]


def build_t5(vocabulary: int) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=vocabulary, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4, pad_token_id=0,
                 eos_token_id=2, decoder_start_token_id=0)
    )  # fmt: skip


def build_bart(vocabulary: int) -> BartForConditionalGeneration:
    return BartForConditionalGeneration(
        BartConfig(vocab_size=vocabulary, d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
                   decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
                   pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, init_std=0.3,
                   forced_eos_token_id=None)
    )  # fmt: skip


#: What each tokenizer puts around a text: T5's an end, BART's a beginning and an end.
AROUND = {build_t5: "$A <eos>", build_bart: "<bos> $A <eos>"}


@pytest.fixture(params=[build_bart, pytest.param(build_t5, marks=pytest.mark.slow)], scope="module")
def model_dir(request: pytest.FixtureRequest, inputs: Path, tiny_llama_dir: Path) -> Path:
    folder = inputs / request.param.__name__
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_llama_dir)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=AROUND[request.param], special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        request.param(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(model_dir: Path, inputs: Path) -> Recipe:
    rows = [{"input": f"{a} : {b} {i}", "target": f"the {a} was {b} and the {b} was {a} {i}"}
            for i, (a, b) in enumerate((a, b) for a in NAMES for b in NAMES)]  # fmt: skip
    (inputs / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return validate_recipe(
        {
            "name": "pairs",
            "model": {"base": str(model_dir), "dtype": "float32"},
            "prefix": {"num_virtual_tokens": 3, "reparam_depth": 2, "reparam_width": 16},
            "data": {"source": str(inputs / "pairs.jsonl"), "format": "input_target",
                     "split": {"train": 0.6, "validation": 0.2, "test": 0.2, "judge": 0}},
            "train": {"steps": 30, "batch_size": 8, "evaluate_every": 10, "threads": 1, "learning_rate": 0.05},
            "evaluation": {"samples": 3, "heldout_rows": 8, "bootstrap": 100, "instruction": "write it"},
            "generation": {"max_new_tokens": 6},
        }
    )  # fmt: skip


def test_a_prefix_learns_pairs_and_what_it_learned_is_saved(run: Run) -> None:
    scores = read_json(run.folder / "scores.json")
    assert scores["heldout_nll"] < scores["base.heldout_nll"] - 0.3
    assert {"instruction.heldout_nll", "fluency_ppl", "real.fluency_ppl", "novelty"} <= set(scores)
    _, prefix, _ = load_run(run.folder)
    assert {site.placement for site in prefix.states.geometry.sites} == {"encoder_self", "decoder_self", "cross"}
    assert prefix.position_offset == 0
    assert (run.folder / "report.html").is_file()
    record = read_json(run.folder / "run.json")
    assert record["base_weights_hash"]["before"] == record["base_weights_hash"]["after"]


def restaurant(one: str, other: str) -> dict[str, Any]:
    return {"meaning_representation": f"name[{one}], near[{other}]", "target": f"the {one} is near the {other}"}


def paper(one: str, other: str) -> dict[str, Any]:
    sentences = [f"we study {one} .", f"we find {other} ."]
    return {"source": sentences, "target": [f"{one} is {other}", f"{other} in {one}"], "source_labels": [0, 1]}


@pytest.mark.parametrize(("recipe", "make_row"), [("e2e-t5-small", restaurant), ("scitldr-t5-small", paper)])
def test_a_shipped_recipe_trains_on_rows_of_its_columns(
    recipe: str, make_row: Callable[[str, str], dict[str, Any]], model_dir: Path, tmp_path: Path
) -> None:
    rows = [make_row(one, other) for one in NAMES for other in NAMES]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    overrides = [f"model.base={model_dir}", f"data.source={source}", "train.steps=2", "train.threads=1",
                 "train.batch_size=2", "evaluation.samples=2", "evaluation.heldout_rows=3", "evaluation.bootstrap=100",
                 "generation.max_new_tokens=4"]  # fmt: skip
    run = train_run(load_recipe(recipe, overrides), tmp_path / "run", report=quiet)
    prefix = Prefix.load(run.folder)
    assert prefix.states.lengths == (20,) * len(prefix.states.geometry.sites)
    assert "instruction.heldout_nll" in read_json(run.folder / "scores.json")


def test_generate_answers_through_the_command_line(run: Run) -> None:
    asked = ["generate", str(run.folder), "-p", "film : plot", "--temperature", "0"]
    told = prefixkit(*asked, "--base").stdout
    lines = [json.loads(line) for line in prefixkit(*asked, "-n", "2", "--json").stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["film : plot"] * 2
    assert lines[0]["text"] == lines[1]["text"]
    assert f"film : plot\n{lines[0]['text']}" in told


def test_a_run_is_diagnosed_in_every_placement(run: Run, recipe: Recipe) -> None:
    told = prefixkit("diagnose", str(run.folder), "--rows", "5").stdout
    found = read_diagnosis(run.folder / "diagnosis.json")
    base, prefix, _ = load_run(run.folder)
    texts = heldout_texts(recipe.data, base.tokenizer, max_tokens=64, count=5, start=base.start_token_id)
    mass = measure_mass(base, prefix, texts, within=recipe.data.max_tokens)
    assert {place.placement for place in found.placements} == set(Placement)
    assert found.without == ()
    assert found.texts == len(texts) == 5
    for place, measured in zip(found.placements, mass.placements, strict=True):
        assert [layer.share for layer in place.layers] == pytest.approx([s.mean for s in measured.sites], rel=1e-4)
        assert sum(token.share for token in place.virtual_tokens) == pytest.approx(place.share, rel=1e-3)
        assert place.points[-1].last == measured.lengths[len(place.points) - 1]
    sources = sorted((len(example.source_ids or ()) for example in texts), reverse=True)
    assert {place.points[-1].last for place in found.placements if place.placement is not Placement.DECODER_SELF} == {
        sources[2]  # half of five
    }
    page = (run.folder / "diagnosis.html").read_text(encoding="utf-8")
    assert page == render_diagnosis(found)
    assert told.splitlines()[:-1] == lines(found)
    assert told.splitlines()[0] == "Encoder self-attention:"


def test_the_length_asked_for_is_that_of_the_longer_text(run: Run) -> None:
    found = diagnose_run(run.folder, tokens=8, report=quiet).diagnosis
    assert max(place.points[-1].last for place in found.placements) == 8
    with pytest.raises(EvaluationError, match=r"no held-out text of .*pairs.jsonl has 60 tokens, the longest has 1\d;"):
        diagnose_run(run.folder, tokens=60, report=quiet)
    special = len(load_run(run.folder)[0].tokenizer("")["input_ids"])
    if special > 1:  # BART's
        with pytest.raises(EvaluationError, match="--tokens: 2 leaves no room for text beside 2 special tokens; give"):
            diagnose_run(run.folder, tokens=2, report=quiet)


@pytest.fixture
def base(model_dir: Path) -> Base:
    return load_base_model(str(model_dir), dtype="float64")


def rows(*pairs: tuple[str, str]) -> list[Row]:
    return [Row(number, input=source, target=target) for number, (source, target) in enumerate(pairs)]


def test_examples_give_each_stack_its_own_text_and_lose_nothing(base: Base, recipe: Recipe) -> None:
    tokenizer, start = base.tokenizer, base.start_token_id
    pairs = rows(("the film", "great fun"), ("a", "it was really great"))
    built = build_examples(pairs, recipe.data, tokenizer, start=start).examples
    ids = tokenizer(["great fun", "it was really great"])["input_ids"]
    assert [row[-1] for row in ids] == [tokenizer.eos_token_id] * 2
    assert [example.input_ids for example in built] == [(start, *row) for row in ids]
    assert [example.labels for example in built] == [(-100, *row) for row in ids]
    batch = Collator(tokenizer.pad_token_id)(built)
    read = [len(tokenizer(text)["input_ids"]) for text in ("the film", "a")]
    assert batch["attention_mask"].sum(dim=1).tolist() == read
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, max(read))
    assert batch["decoder_input_ids"].shape == batch["labels"].shape == (2, 1 + len(ids[1]))


def test_the_held_out_loss_is_the_models_own(run: Run, base: Base, recipe: Recipe) -> None:
    prefix = Prefix.load(run.folder)
    pairs = rows(("the film", "great fun"), ("a story", "it was really great"))
    built = build_examples(pairs, recipe.data, base.tokenizer, start=base.start_token_id).examples
    for example in built:
        with attach(base.model, prefix):
            own = base.model(
                input_ids=torch.tensor([example.source_ids]), labels=torch.tensor([example.labels[1:]])
            ).loss
        found = heldout_loss(base, [example], prefix=prefix)
        assert found.mean == pytest.approx(float(own), abs=1e-12)
    together = heldout_loss(base, built, prefix=prefix)
    assert together.nats == pytest.approx([heldout_loss(base, [e], prefix=prefix).nats[0] for e in built], abs=1e-10)


def test_texts_do_not_depend_on_who_else_is_in_the_batch(base: Base, recipe: Recipe) -> None:
    prompts = ["the film", "a story : plot and cast", "music"]
    settings = recipe.generation.model_copy(update={"max_new_tokens": 5, "temperature": 0})
    together = generate_texts(base, prompts, settings, seed=0)
    assert together == [generate_texts(base, [prompt], settings, seed=0)[0] for prompt in prompts]


def test_long_texts_are_cut_keeping_what_ends_a_source(base: Base, recipe: Recipe) -> None:
    config = recipe.data.model_copy(update={"max_tokens": 4})
    long = rows(("a film and the story of it", "it was really great and fun"))
    built = build_examples(long, config, base.tokenizer, start=0)
    (example,) = built.examples
    assert (built.truncated, len(example.source_ids or ()), len(example.input_ids)) == (1, 4, 4)
    assert (example.source_ids or ())[-1] == base.tokenizer.eos_token_id
    assert example.input_ids[-1] != base.tokenizer.eos_token_id
    strict = config.model_copy(update={"truncate": False})
    with pytest.raises(DataError, match=r"row 0: one of its texts has more tokens, more than data.max_tokens \(4\)"):
        build_examples(long, strict, base.tokenizer, start=0)


def test_an_instruction_stands_before_what_training_would_read(base: Base, recipe: Recipe) -> None:
    config = recipe.data.model_copy(update={"max_tokens": 5})
    examples = build_examples(rows(("a film and the story of it", "great")), config, base.tokenizer, start=0).examples
    system = System(SystemName.INSTRUCTION, instruction="write it")
    lead = tuple(base.tokenizer("write it\n", add_special_tokens=False)["input_ids"])
    (plain,), (led,) = examples, system.examples(base, examples)
    opening = opening_ids(base.tokenizer)
    assert led.source_ids == opening + lead + plain.source_ids[len(opening) :]
    assert (led.input_ids, led.labels) == (plain.input_ids, plain.labels)
    assert system.source_tokens(base, 5) == 5 + len(lead)
    asked = encode_prompts(base, system.prompts([plain.prompt]), source_tokens=system.source_tokens(base, 5))
    assert [tuple(ids) for ids in asked] == [led.source_ids]


def test_a_row_longer_than_the_context_is_cut_not_refused(recipe: Recipe, model_dir: Path, tmp_path: Path) -> None:
    path = Path(recipe.data.source)
    long = {"input": "film story " * 90, "target": "the film was long"}
    path.write_text(path.read_text(encoding="utf-8") + "\n" + json.dumps(long), encoding="utf-8")
    values = recipe.model_dump(mode="json")
    values["data"]["max_tokens"], values["train"]["steps"], values["evaluation"]["heldout_rows"] = 8, 2, 99
    scores = read_json(train_run(validate_recipe(values), tmp_path / "run", report=quiet).folder / "scores.json")
    assert {"instruction.heldout_nll", "instruction.fluency_ppl"} <= set(scores)


def test_fluency_is_scored_behind_what_the_decoder_writes_before_every_text(base: Base) -> None:
    """BART writes BOS first; scored without it, a text it is certain of would look wildly unlikely."""
    prompts, texts = ["the film", "a story : plot"], ["great fun", "it was really great"]
    found = fluency_losses(base, prompts, texts)
    for place, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        written = base.tokenizer(text)["input_ids"]
        words = len(base.tokenizer(text, add_special_tokens=False)["input_ids"])
        decoder = torch.tensor([[base.start_token_id, *written[:-1]]])
        source = torch.tensor([base.tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            logits = base.model(input_ids=source, decoder_input_ids=decoder).logits[0]
        each = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(written[:-1]), reduction="none")
        assert found.nats[place] == pytest.approx(float(each[-words:].sum()), abs=1e-9)
        assert found.tokens[place] == words


def test_conversations_are_refused(base: Base, recipe: Recipe) -> None:
    config = recipe.data.model_copy(update={"format": Format.MESSAGES})
    with pytest.raises(DataError, match="messages needs a decoder-only base model; use input_target"):
        build_examples([], config, base.tokenizer, start=0)


def test_a_model_that_names_no_start_is_refused(base: Base) -> None:
    base.model.config.decoder_start_token_id = None
    base.model.generation_config.decoder_start_token_id = None
    with pytest.raises(ModelError, match="names no decoder_start_token_id; set it in its config.json"):
        assert base.start_token_id


def test_each_stack_has_the_context_to_itself(base: Base, recipe: Recipe) -> None:
    if base.context_tokens is None:  # T5 knows distances only
        return
    settings = recipe.generation.model_copy(update={"max_new_tokens": 60})
    assert len(generate_texts(base, ["film " * 50], settings, seed=0)) == 1
    with pytest.raises(
        DataError, match="prompt 102 or 60 new tokens exceed the model's context of 64; shorten the prompt"
    ):
        generate_texts(base, ["film " * 100], settings, seed=0)
    more = settings.model_copy(update={"max_new_tokens": 64})
    with pytest.raises(DataError, match="prompt 3 or 64 new tokens exceed the model's context of 64"):
        generate_texts(base, ["film"], more, seed=0)
