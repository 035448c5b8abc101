"""Every method trains, leaves the base model alone, is saved, and resumes to the bit; hybrids at a rate per part."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from methods.conftest import METHODS
from prefixkit.config import MethodConfig, Recipe, dump_recipe
from prefixkit.data import Collator, input_ends
from prefixkit.errors import ArtefactError, ConfigError
from prefixkit.injection import attach
from prefixkit.models.fingerprint import weights_hash
from prefixkit.prefix import BaseCard, Prefix
from prefixkit.training import Outcome, Trained, checkpoint_folder, checkpoints, read_metrics, train_prefix
from prefixkit.training.checkpoint import read_own
from prefixkit.training.model import Part
from prefixkit.training.start import build_model
from prefixkit.training.trainer import PrefixTrainer
from training.test_run import quiet, run_apart

Load = Callable[[Recipe], Any]
Make = Callable[..., Recipe]

ALL: dict[str, Any] = METHODS | {
    "infix": "infix",
    "embedding": "embedding",
    "prompt-tuning": "prompt-tuning",
    "p-tuning": "p-tuning",
    "prefix+lora": {"kind": "lora", "rank": 2, "beside_prefix": True},
    "prefix+bitfit": "prefix+bitfit",
    "prefix+adapter": "prefix+adapter",
    "mam": "mam",
}
#: Rates at which 30 steps on a tiny random model show.
RATES = {"full": 5e-3, "top-layers": 5e-3, "ia3": 5e-2, "embedding": 0.3, "prompt-tuning": 0.3}


def recipe_for(name: str, make_recipe: Make, **sections: Any) -> Recipe:
    given = ALL[name]
    settings = MethodConfig.model_validate(given).model_dump(exclude_defaults=True, mode="json")
    settings |= {} if name == "infix" else {"learning_rate": RATES.get(name, 2e-2)}
    return make_recipe(method=settings, **sections)


def losses(trained: Trained) -> float:
    """Stand in for a held-out loss: falls from look to look, so that the last step is the best."""
    losses.next -= 1  # type: ignore[attr-defined]
    return losses.next  # type: ignore[attr-defined, no-any-return]


losses.next = 0.0  # type: ignore[attr-defined]


def as_prefix(trained: Trained, *, infix: bool = False) -> Prefix:
    base = BaseCard(id="tiny")
    return Prefix.from_states(trained.states, base=base, head=trained.head, deltas=trained.deltas, infix=infix)


def train(recipe: Recipe, load: Load, folder: Path) -> tuple[Any, Any, Outcome]:
    base, data = load(recipe)
    folder.mkdir(exist_ok=True)
    outcome = train_prefix(base, data.train, recipe, folder, classes=data.classes, measure=losses, report=quiet)
    return base, data, outcome


@pytest.mark.parametrize("name", ALL)
def test_the_loss_falls_the_base_model_does_not_move_and_the_artefact_says_what_was_learned(
    name: str, make_recipe: Make, load: Load, tmp_path: Path
) -> None:
    steps = {"steps": 40, "learning_rate": 0.05, "checkpoint_every": 100, "evaluate_every": 40, "patience": None}
    recipe = recipe_for(name, make_recipe, train=steps)
    base, data, outcome = train(recipe, load, tmp_path / "run")
    found = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert sum(found[-5:]) / 5 < sum(found[:5]) / 5 - 0.05
    fresh, _ = load(recipe)
    assert weights_hash(base.model) == weights_hash(fresh.model)
    prefix = as_prefix(outcome.trained, infix=name == "infix").save(tmp_path / "artefact")
    again = Prefix.load(tmp_path / "artefact")
    batch = Collator(base.tokenizer.pad_token_id)(data.train[:4])
    labels = batch.pop("labels")
    with torch.no_grad():
        plain = base.model(**batch, labels=labels).loss
        with attach(base.model, again) as handle, handle.infix_at(input_ends(labels)):
            steered = base.model(**batch, labels=labels).loss
        model = build_model(base, data.train, recipe, data.classes)
        model.load_trained_state(outcome.state)
        trained = model.eval()(**batch, labels=labels)["loss"]
        model.close()
    assert steered < plain - 0.05
    torch.testing.assert_close(steered, trained, rtol=1e-4, atol=1e-5)
    assert prefix.parts == again.parts
    has_tokens = recipe.method.has_prefix or recipe.method.kind.is_prompt
    assert prefix.parts == (("prefix",) if has_tokens else ()) + ((str(recipe.method.kind),) if again.deltas else ())
    assert bool(again.deltas) == recipe.method.kind.is_delta


@pytest.mark.parametrize(
    ("name", "fail_at"),
    [
        ("prefix+lora", (3,)),  # after a rollback, at half the rates
        ("full", ()),
        ("p-tuning", ()),
        *(
            pytest.param(name, (3,), marks=pytest.mark.slow)
            for name in ("lora", "bitfit-added", "parallel", "embedding")
        ),
    ],
)
def test_a_run_killed_at_any_step_ends_in_the_same_artefact(
    name: str, fail_at: tuple[int, ...], make_recipe: Make, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    prefix = {"reparam_depth": 1, "reparam_width": 8}
    recipe.write_text(dump_recipe(recipe_for(name, make_recipe, prefix=prefix)), encoding="utf-8")
    whole = run_apart(recipe, tmp_path / "whole", -1, *fail_at)
    assert whole.returncode == 0, whole.stderr
    killed = run_apart(recipe, tmp_path / "killed", 5, *fail_at)
    assert killed.returncode == -9
    resumed = run_apart(recipe, tmp_path / "killed", -1, *fail_at)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout) == json.loads(whole.stdout)
    assert json.loads(whole.stdout)["rollbacks"] == len(fail_at)


@pytest.mark.parametrize(
    "name", ["mam", "full", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lora", "prompt-tuning"))]
)
def test_gradient_checkpointing_and_accumulation_train_the_same(
    name: str, make_recipe: Make, load: Load, tmp_path: Path
) -> None:
    found = []
    for folder, own in {
        "plain": {"batch_size": 8},
        "checkpointed": {"batch_size": 8, "gradient_checkpointing": True},
        "accumulated": {"batch_size": 2, "accumulation": 4},
    }.items():
        settings = {"steps": 4, "learning_rate": 0.02, "group_by_length": False} | own
        recipe = recipe_for(name, make_recipe, model={"dtype": "float64"}, prefix={"dropout": 0.0}, train=settings)
        found.append(train(recipe, load, tmp_path / folder)[2].state)
    for other in found[1:]:
        for key, tensor in found[0].items():
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["full", "bitfit", "lora", "mam", "prompt-tuning", "infix"])
def test_a_bfloat16_base_model_is_trained_in_float32(
    name: str, make_tiny_gpt2: Any, make_recipe: Make, tiny_tokenizer: Any, tmp_path: Path, load: Load
) -> None:
    for part in (make_tiny_gpt2(), tiny_tokenizer):
        part.save_pretrained(tmp_path / "gpt2")
    model = {"base": str(tmp_path / "gpt2"), "dtype": "bfloat16"}
    recipe = recipe_for(name, make_recipe, model=model, prefix={"dropout": 0.0}, train={"steps": 4, "warmup": 0.0})
    start = started(recipe, load)
    outcome = train(recipe, load, tmp_path / "run")[2]
    trained = {key: tensor for key, tensor in outcome.state.items() if key != "units"}
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert sum(bool((tensor != start[key]).any()) for key, tensor in trained.items()) > 0.9 * len(trained)
    numbers = sum(tensor.numel() for tensor in trained.values())
    assert outcome.trained_parameters == numbers


def test_biases_do_not_decay(make_tiny_gpt2: Any, make_recipe: Make, load: Load) -> None:
    from transformers import Trainer, TrainingArguments

    recipe = make_recipe(method={"kind": "full"})
    base, data = load(recipe)
    model = build_model(replace(base, model=make_tiny_gpt2()), data.train, recipe, ())
    options = TrainingArguments(output_dir="unused", weight_decay=0.1, use_cpu=True, report_to="none")
    optimizer = Trainer(model, options).create_optimizer()
    decayed = {id(number) for number in optimizer.param_groups[0]["params"]}
    assert model.delta is not None
    for name, number in model.delta.named().items():
        if name.endswith("bias"):
            assert id(number) not in decayed, name
        elif ".ln_" not in name:  # which GPT-2's Trainer does not know as a norm by its name
            assert id(number) in decayed, name
    model.close()


def moved(outcome: Outcome, start: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far each part went, at most."""
    far = {"prefix": 0.0, "delta": 0.0}
    for key, tensor in outcome.state.items():
        part = "delta" if key.startswith("delta.") else "prefix"
        far[part] = max(far[part], float((tensor - start[key]).abs().max()))
    return far


def started(recipe: Recipe, load: Load) -> dict[str, torch.Tensor]:
    base, data = load(recipe)
    model = build_model(base, data.train, recipe, data.classes)
    model.close()
    return {key: tensor.detach().clone() for key, tensor in model.trained_state().items()}


@pytest.mark.parametrize(("prefix_rate", "delta_rate"), [(0.02, 0.001), (0.0, 0.001), (0.02, 0.0)])
def test_each_part_of_a_hybrid_goes_by_its_own_rate(
    prefix_rate: float, delta_rate: float, make_recipe: Make, load: Load, tmp_path: Path
) -> None:
    """Adam's first step is the rate itself, whatever the gradient."""
    settings = {"steps": 1, "learning_rate": prefix_rate, "warmup": 0.0, "schedule": "constant"}
    method = {"kind": "adapter", "beside_prefix": True, "learning_rate": delta_rate}
    recipe = make_recipe(train=settings, method=method, prefix={"dropout": 0.0})
    base, data = load(recipe)
    model = build_model(base, data.train, recipe, data.classes)
    model.close()
    expected = [part for part, rate in ((Part.PREFIX, prefix_rate), (Part.METHOD, delta_rate)) if rate]
    assert list(model.parts()) == expected
    outcome = train(recipe, load, tmp_path / "run")[2]
    far = moved(outcome, started(recipe, load))
    assert far["prefix"] == pytest.approx(prefix_rate, rel=1e-3)
    assert far["delta"] == pytest.approx(delta_rate, rel=1e-3)
    numbers = {Part.PREFIX: model.encoder.num_parameters(), Part.METHOD: model.delta.num_parameters()}  # type: ignore[union-attr]
    assert outcome.trained_parameters == sum(numbers[part] for part in expected)
    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert line["learning_rate"] == pytest.approx(prefix_rate or delta_rate)
    assert line.get("method.learning_rate") == (pytest.approx(delta_rate) if prefix_rate and delta_rate else None)


def test_every_step_tells_the_rate_of_each_part(make_recipe: Make, load: Load, tmp_path: Path) -> None:
    labelled = {"format": "classes", "keep_label": None, "prompt": ""}
    settings = {"steps": 4, "learning_rate": 0.03, "warmup": 0.25, "schedule": "linear"}
    method = {"kind": "lora", "rank": 2, "beside_prefix": True, "learning_rate": 0.02}
    recipe = make_recipe(train=settings, method=method, data=labelled, head={"learning_rate": 0.01})
    base, data = load(recipe)
    train_prefix(base, data.train, recipe, tmp_path, classes=data.classes, measure=losses, report=quiet)
    steps = read_metrics(tmp_path / "metrics.jsonl")[1:]
    factors = [0.0, 1.0, 2 / 3, 1 / 3]
    for key, peak in {"learning_rate": 0.03, "method.learning_rate": 0.02, "head.learning_rate": 0.01}.items():
        assert [line[key] for line in steps] == pytest.approx([peak * factor for factor in factors])


def test_parts_are_trained_one_after_the_other(make_recipe: Make, load: Load, tmp_path: Path) -> None:
    """First a prefix; then a LoRA beside it, the prefix standing still; then both from there."""
    first = make_recipe(train={"steps": 6, "learning_rate": 0.05}, prefix={"dropout": 0.0})
    outcome = train(first, load, tmp_path / "first")[2]
    as_prefix(outcome.trained).save(tmp_path / "a prefix")
    start = {"dropout": 0.0, "init": {"kind": "prefix", "path": str(tmp_path / "a prefix")}}
    method: dict[str, Any] = {"kind": "lora", "rank": 2, "beside_prefix": True, "learning_rate": 0.05}
    second = make_recipe(train={"steps": 6, "learning_rate": 0.0}, prefix=start, method=method)
    both = train(second, load, tmp_path / "second")[2].trained
    assert both.states.equals(outcome.trained.states)
    hybrid = as_prefix(both).save(tmp_path / "a hybrid")
    assert hybrid.parts == ("prefix", "lora")
    start["init"] = {"kind": "prefix", "path": str(tmp_path / "a hybrid")}
    third = make_recipe(train={"steps": 1}, prefix=start, method=method | {"start": str(tmp_path / "a hybrid")})
    at_start = started(third, load)
    for name, tensor in both.deltas[0].tensors.items():
        assert torch.equal(at_start[f"delta.{name}"], tensor)
    other = make_recipe(prefix=start, method=method | {"start": str(tmp_path / "a hybrid"), "rank": 3})
    with pytest.raises(ArtefactError, match=r"method.start: .*expected a trained lora, found it with .*'rank': 2"):
        build_model(*load(other)[:1], load(other)[1].train, other, ())
    none = make_recipe(method={"kind": "bitfit", "start": str(tmp_path / "a prefix")})
    with pytest.raises(ArtefactError, match=r"expected a trained bitfit, found none"):
        build_model(*load(none)[:1], load(none)[1].train, none, ())


def test_a_tied_output_embedding_gets_its_gradient(make_tiny_gpt2: Any, make_recipe: Make, load: Load) -> None:
    """The loss that knows its own gradient takes the head as frozen: it must not be used where it is trained."""
    recipe = make_recipe(method={"kind": "full"}, model={"dtype": "float64"})
    base, data = load(recipe)
    base = replace(base, model=make_tiny_gpt2().double())
    model = build_model(base, data.train, recipe, ())
    assert not model.plain_head
    batch = Collator(base.tokenizer.pad_token_id)(data.train[:3])
    model(**batch)["loss"].backward()
    assert model.delta is not None
    found = {name: number.grad for name, number in model.delta.named().items()}
    model.close()
    rival = make_tiny_gpt2().double().requires_grad_(True)
    labels = batch.pop("labels")
    logits = rival(**batch).logits[:, :-1]
    scored = labels[:, 1:] != -100
    torch.nn.functional.cross_entropy(logits[scored], labels[:, 1:][scored]).backward()
    for name, number in rival.named_parameters():
        torch.testing.assert_close(found[name], number.grad, rtol=1e-9, atol=1e-12)


def test_labels_are_learned_with_a_lora_too(make_recipe: Make, load: Load, tmp_path: Path) -> None:
    labelled = {"format": "classes", "keep_label": None, "prompt": ""}
    recipe = make_recipe(data=labelled, method={"kind": "lora", "learning_rate": 0.02}, head={"learning_rate": 0.01})
    base, data = load(recipe)
    outcome = train_prefix(base, data.train, recipe, tmp_path, classes=data.classes, measure=losses, report=quiet)
    prefix = as_prefix(outcome.trained).save(tmp_path)
    assert prefix.parts == ("lora",)
    assert Prefix.load(tmp_path).head is not None
    first, last = (read_own(path)[0] for path in checkpoints(checkpoint_folder(tmp_path)))
    assert all((first[key] - last[key]).abs().max() > 1e-5 for key in first)


def test_a_prefix_does_not_start_from_what_has_no_virtual_tokens(make_recipe: Make, load: Load, tmp_path: Path) -> None:
    recipe = make_recipe(method={"kind": "lora"}, train={"steps": 1})
    as_prefix(train(recipe, load, tmp_path / "run")[2].trained).save(tmp_path / "lora")
    again = make_recipe(prefix={"init": {"kind": "prefix", "path": str(tmp_path / "lora")}})
    base, data = load(again)
    with pytest.raises(ConfigError, match=r"prefix.init.path: .*lora: holds no virtual tokens"):
        build_model(base, data.train, again, ())


def test_what_cannot_go_together_is_refused(make_recipe: Make) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"method": {"kind": "lora", "learning_rate": 0.0}}, "nothing would be trained"),
        ({"train": {"learning_rate": 0.0}}, "nothing would be trained"),
        ({"method": {"kind": "lora"}, "model": {"shard": True}}, "model.shard: lora cannot be trained in a sharded"),
        ({"method": {"kind": "embedding"}, "prefix": {"gate": True}}, "prefix.gate: virtual tokens of embedding"),
        ({"method": {"kind": "p-tuning", "beside_prefix": True}}, "method: beside_prefix: p-tuning stands where"),
        ({"method": {"kind": "prompt-tuning", "start": "x"}}, "method: start: a saved prefix holds no embeddings"),
        ({"method": {"kind": "infix"}, "data": {"prompt": ""}}, "data.prompt: an infix stands behind an input"),
        ({"method": {"kind": "bitfit", "rank": 4}}, "method: rank: is a setting of lora, and the method is bitfit"),
    ]
    for sections, message in refused:
        with pytest.raises(ConfigError, match=message):
            make_recipe(**sections)


def test_a_soft_prompt_that_stands_still_beside_a_head_goes_on(make_recipe: Make, load: Load, tmp_path: Path) -> None:
    labelled = {"format": "classes", "keep_label": None, "prompt": ""}
    method = {"kind": "prompt-tuning", "learning_rate": 0.0}
    recipe = make_recipe(method=method, data=labelled, train={"steps": 4, "evaluate_every": 2})
    base, data = load(recipe)
    short = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 2})})
    train_prefix(base, data.train, short, tmp_path, classes=data.classes, measure=lambda _: 1.0, report=quiet)
    outcome = train_prefix(
        base, data.train, recipe, tmp_path, classes=data.classes, measure=lambda _: 1.0, report=quiet
    )
    assert outcome.steps == 4
    assert outcome.trained_parameters == sum(
        each.numel() for each in (outcome.trained.head.weight, outcome.trained.head.bias)
    )


@pytest.mark.parametrize(
    ("name", "decays"), [("full", True), ("top-layers", True), ("lora", True), ("ia3", False), ("bitfit", False)]
)
def test_matrices_decay_and_nothing_else(
    name: str, decays: bool, make_recipe: Make, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, set[bool]] = {}
    create = PrefixTrainer.create_optimizer

    def look(self: PrefixTrainer, *given: Any) -> Any:
        optimizer = create(self, *given)
        decayed = {id(n) for group in optimizer.param_groups if group["weight_decay"] for n in group["params"]}
        for number in self._trained().delta.numbers:
            found.setdefault("matrix" if number.dim() > 1 else "vector", set()).add(id(number) in decayed)
        return optimizer

    monkeypatch.setattr(PrefixTrainer, "create_optimizer", look)
    recipe = recipe_for(name, make_recipe, train={"steps": 1, "weight_decay": 0.1})
    base, data = load(recipe)
    train_prefix(base, data.train, recipe, tmp_path, measure=lambda _: 1.0, report=quiet)
    assert found.get("matrix", {decays}) == {decays}
    assert found.get("vector", {False}) == {False}
