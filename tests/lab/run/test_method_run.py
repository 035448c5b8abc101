"""Runs of other methods than the prefix, from command to report, by the same commands."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from prefixkit.config import Recipe, dump_recipe, load_recipe, parse_recipe
from prefixkit.errors import ArtefactError, ConfigError, ExportError
from prefixkit.export import to_peft
from prefixkit.files import read_json
from prefixkit.injection import attach
from prefixkit.lab.run.loaded_run import load_run
from prefixkit.lab.run.run import train_run
from prefixkit.methods import registry
from prefixkit.peft import PeftModel
from prefixkit.prefix import Prefix
from processes import prefixkit

from ..conftest import quiet


@pytest.mark.parametrize(
    ("method", "parts", "title"),
    [
        ("lora", ["lora"], "LoRA"),
        ("prefix+bitfit", ["prefix", "bitfit"], "prefix + BitFit"),
        ("prompt-tuning", ["prefix"], "prompt tuning"),
        pytest.param("infix", ["prefix"], "infix", marks=pytest.mark.slow),
    ],
)
def test_a_run_leaves_what_a_run_of_a_prefix_leaves(
    method: str, parts: list[str], title: str, recipe: Recipe, tmp_path: Path
) -> None:
    rate = "train.learning_rate=0.02" if method == "infix" else "method.learning_rate=0.02"
    changed = parse_recipe(dump_recipe(recipe), [f"method={method}", rate])
    run = train_run(changed, tmp_path / "run", report=quiet)
    record, scores = read_json(run.folder / "run.json"), read_json(run.folder / "scores.json")
    assert record["parts"] == parts == list(run.prefix.parts)
    assert record["trainable_parameters"] == scores["trainable_parameters"] > 0
    assert record["base_weights_hash"]["before"] == record["base_weights_hash"]["after"]
    assert scores["heldout_nll"] != scores["base.heldout_nll"]
    assert (record["num_virtual_tokens"] > 0) == ("prefix" in parts)
    page = run.report.read_text(encoding="utf-8")
    assert f">{title}<" in page or f"{title}</th>" in page
    again = train_run(changed, tmp_path / "run", resume=True, report=quiet)
    assert again.scores == run.scores


def test_the_commands_work_on_a_hybrid_and_turn_its_parts_off(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")

    def call(*words: str) -> str:
        done = prefixkit(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    call("train", "recipe.yaml", "method.rank=2", "method=prefix+lora", "method.learning_rate=0.5", "name=both")
    shown = call("show", "runs/both")
    assert "parts                  prefix, lora" in shown
    assert "size                   640 numbers, gate no" in shown  # of 3 virtual tokens and the LoRA
    assert "lora                   448 numbers, rank 2, alpha 4.0, dropout 0.0" in shown
    Prefix.load(tmp_path / "runs" / "both").without("lora").save(tmp_path / "alone")
    alone = call("show", "alone")
    assert "size                   192 numbers, gate no" in alone
    assert alone.splitlines()[-1].endswith("640 parameters, together with lora, turned off since")
    options = ("--json", "--seed", "1", "-n", "2", "--max-new-tokens", "12")
    ways = [(), ("lora",), ("prefix",), ("prefix", "lora")]
    texts = {way: call("generate", "runs/both", *options, *(w for part in way for w in ("--without", part)))
             for way in ways}  # fmt: skip
    assert len(set(texts.values())) == 4
    plain = call("generate", "runs/both", *options, "--base").splitlines()[2:]
    bare = [json.loads(line)["text"] for line in texts["prefix", "lora"].splitlines()]
    assert bare == [json.loads(line)["text"] for line in plain]
    unknown = prefixkit("generate", "runs/both", "--without", "ia3", cwd=tmp_path)
    assert unknown.returncode == 1
    assert "ia3: not a part of this artefact, which has prefix, lora" in unknown.stderr
    call("evaluate", "runs/both")


def test_a_lora_goes_to_peft(recipe: Recipe, tmp_path: Path) -> None:
    overrides = ["method=lora", "method.learning_rate=0.5", "train.warmup=0", "train.steps=2", "evaluation.samples=0"]
    folder = train_run(parse_recipe(dump_recipe(recipe), overrides), tmp_path / "run", report=quiet).folder
    done = prefixkit("export", "peft", str(folder), "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    base, prefix, _ = load_run(folder)
    model, ids = base.model.double(), torch.tensor([[1, 9, 30, 4]])
    plain = model(ids).logits
    with attach(model, prefix):
        expected = model(ids).logits
    assert (expected - plain).abs().max() > 1e-3
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=1e-10)


def test_what_has_no_words_for_a_delta_refuses_it(recipe: Recipe, tmp_path: Path) -> None:
    changed = parse_recipe(dump_recipe(recipe), ["method=prefix+adapter", "train.steps=1", "evaluation.samples=0"])
    run = train_run(changed, tmp_path / "run", report=quiet)
    base, prefix, _ = load_run(run.folder)
    with pytest.raises(ExportError, match=r"cannot say adapter.*prefix.without\(\"adapter\"\)"):
        to_peft(prefix, tmp_path / "peft", model=base.model)
    to_peft(prefix.without("adapter"), tmp_path / "peft", model=base.model)
    with pytest.raises(ArtefactError, match="holds adapter beside its prefix"):
        PeftModel.from_pretrained(base.model, run.folder)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method=lora", "method.rank=4"], {"kind": "lora", "rank": 4}),
        (["method.rank=4", "method=prefix+lora"], {"kind": "lora", "rank": 4, "beside_prefix": True}),
        (["method=mam"], {"kind": "adapter", "style": "parallel", "beside_prefix": True}),
        (["method.kind=top-layers", "method.top_layers=3"], {"kind": "top-layers", "top_layers": 3}),
    ],
)
def test_a_method_is_named_in_a_word(overrides: list[str], expected: dict[str, Any]) -> None:
    method = load_recipe("positive-reviews", overrides).method
    assert method.model_dump(mode="json", exclude_defaults=True) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=lorra"], "method.kind: expected .*'lora'.*, got 'lorra'"),
        (["method=lora+bitfit"], r"method: 'lora\+bitfit': a hybrid is prefix\+<one other method>"),
        (["method=lora+bitfit", "method.rank=2"], r"method: 'lora\+bitfit': a hybrid is prefix\+<one other method>"),
        (["method=lora", "method.rnak=2"], "method.rnak: unknown key.*rank"),
        (
            ["method=lora", "train.learning_rate=0.1"],
            "train.learning_rate: does not reach lora, whose rate is method.le",
        ),
        (["method=lora", "prefix.gate=true"], "prefix.gate: no prefix is trained with method lora; for both, method=p"),
        (["method=p-tuning", "prefix.init.kind=words"], "prefix.init.kind: p-tuning does not read it"),
        (["method=prompt-tuning", "prefix.reparam_depth=1"], "prefix.reparam_depth: prompt-tuning does not read it"),
        (["method=prefix", "method.learning_rate=0.1"], "method: learning_rate: that of a prefix is train.learning_ra"),
    ],
)
def test_a_method_that_is_none_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("positive-reviews", overrides)


def test_a_damaged_delta_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    changed = parse_recipe(dump_recipe(recipe), ["method=lora", "train.steps=1", "evaluation.samples=0"])
    folder = train_run(changed, tmp_path / "run", report=quiet).folder
    card = json.loads((folder / "prefix.json").read_text(encoding="utf-8"))
    name = next(iter(card["deltas"][0]["tensors"]))
    for damage, message in (
        ({"tensors": card["deltas"][0]["tensors"] | {"nowhere": [2]}}, "tensor lora:nowhere is missing"),
        ({"tensors": card["deltas"][0]["tensors"] | {name: [1, 2]}}, f"lora:{name}: expected shape"),
        ({"method": "sorcery"}, "deltas.0.method: Input should be"),
    ):
        changed_card = card | {"deltas": [card["deltas"][0] | damage]}
        (folder / "prefix.json").write_text(json.dumps(changed_card), encoding="utf-8")
        with pytest.raises(ArtefactError, match=message):
            Prefix.load(folder)
    (folder / "prefix.json").write_text(json.dumps(card | {"deltas": 2 * card["deltas"]}), encoding="utf-8")
    with pytest.raises(ArtefactError, match="holds one method twice"):
        Prefix.load(folder)
    without = {key: value for key, value in card.items() if key != "deltas"}
    (folder / "prefix.json").write_text(json.dumps(without), encoding="utf-8")
    with pytest.raises(ArtefactError, match="unexpected tensor lora:"):
        Prefix.load(folder)


def test_a_run_is_not_resumed_with_another_method(recipe: Recipe, tmp_path: Path) -> None:
    changed = parse_recipe(dump_recipe(recipe), ["method=bitfit", "evaluation.samples=0"])
    train_run(changed, tmp_path / "run", report=quiet)
    for override, words in [
        ("method.learning_rate=0.3", "method.learning_rate: the run was started with None, not 0.3; "),
        ("method=adapter", "method.kind: the run was started with 'bitfit', not 'adapter'; "),
    ]:
        other = parse_recipe(dump_recipe(changed), [override])
        with pytest.raises(ConfigError, match=f"^{words}"):
            train_run(other, tmp_path / "run", resume=True, report=quiet)


def test_a_method_of_pefts_without_peft_names_its_extra(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    changed = parse_recipe(dump_recipe(recipe), ["method=prefix+lora"])
    with pytest.raises(
        ConfigError, match=r"^method: lora is PEFT's, which is not installed; pip install 'prefixkit\[peft\]'$"
    ):
        train_run(changed, tmp_path / "run", report=quiet)
    assert not (tmp_path / "run").exists()
