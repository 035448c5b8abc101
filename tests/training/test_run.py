"""Training learns, leaves the base model alone, resumes to the bit, and survives divergence and full disks."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import processes
from prefixkit.config import Recipe, dump_recipe
from prefixkit.errors import ConfigError, DivergedError, NotFiniteError, TrainingError
from prefixkit.models import load_base_model
from prefixkit.models.fingerprint import weights_hash
from prefixkit.training import (
    Trained,
    build_encoder,
    checkpoint_folder,
    checkpoints,
    read_metrics,
    train_prefix,
    trainer,
)
from prefixkit.training.checkpoint import Progress, read_own
from prefixkit.training.monitor import Monitor
from prefixkit.training.run import _arguments, _roll_back
from training import kill_me

Load = Callable[[Recipe], Any]
Make = Callable[..., Recipe]


def measure(trained: Trained) -> float:
    return float(sum(site.key.square().mean() for site in trained.states.sites))


def last_encoder(folder: Path) -> dict[str, torch.Tensor]:
    return read_own(checkpoints(checkpoint_folder(folder))[-1])[0]


def assert_close_and_moved(one: Any, other: Any, base: Any, recipe: Recipe, data: Any) -> None:
    """Two trained encoders are equal, and neither is where it started: else the comparison would be of nothing."""
    texts = [example.text for example in data.train[:64]]
    start = build_encoder(base, recipe.prefix, seed=recipe.train.seed, texts=texts)
    assert one.keys() == other.keys() == {*start.state_dict(), "units"}
    for name, tensor in start.named_parameters():
        torch.testing.assert_close(one[name], other[name], atol=1e-9, rtol=0)
        assert (tensor - one[name]).abs().max() > 1e-3


def quiet(step: int, steps: int, words: str) -> None:
    """Report nothing."""


def test_the_loss_falls_and_the_base_model_does_not_move(make_recipe: Make, load: Load, tmp_path: Path) -> None:
    recipe = make_recipe(train={"steps": 40, "learning_rate": 0.05, "checkpoint_every": 100, "patience": None})
    base, data = load(recipe)
    before = weights_hash(base.model)
    train_prefix(base, data.train, recipe, tmp_path, measure=measure, report=quiet)
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 40
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.1
    assert weights_hash(base.model) == before
    assert base.model.config._attn_implementation == "sdpa"


def test_accumulated_small_batches_equal_one_large_batch(make_recipe: Make, load: Load, tmp_path: Path) -> None:
    settings = {"steps": 4, "learning_rate": 0.05}
    results = []
    for batch, accumulation in ((8, 1), (2, 4)):
        recipe = make_recipe(
            model={"dtype": "float64"}, prefix={"dropout": 0.0},
            train=settings | {"batch_size": batch, "accumulation": accumulation, "group_by_length": False},
        )  # fmt: skip
        base, data = load(recipe)
        folder = tmp_path / str(batch)
        folder.mkdir()
        train_prefix(base, data.train, recipe, folder, measure=measure, report=quiet)
        results.append(last_encoder(folder))
    assert_close_and_moved(results[0], results[1], base, recipe, data)


def test_gradient_checkpointing_trains_the_same_prefix_and_is_taken_off_again(
    make_recipe: Make, load: Load, tmp_path: Path
) -> None:
    results, calls = [], []
    for on, layers in ((False, None), (True, None), (True, 1)):
        train = {"gradient_checkpointing": on, "recomputed_layers": layers, "steps": 3}
        recipe = make_recipe(model={"dtype": "float64"}, prefix={"dropout": 0.0}, train=train)
        base, data = load(recipe)
        count: list[int] = []
        hooks = []
        for number, layer in enumerate(base.model.model.layers[:2]):
            # Of its attention, before it runs: recomputing stops early, once it has what it needs.
            hooks.append(layer.self_attn.register_forward_pre_hook(lambda *_, n=number, seen=count: seen.append(n)))
        folder = tmp_path / f"{on}-{layers}"
        folder.mkdir()
        train_prefix(base, data.train, recipe, folder, measure=measure, report=quiet)
        for hook in hooks:
            hook.remove()
        calls.append([count.count(0), count.count(1)])
        results.append(last_encoder(folder))
        assert not base.model.is_activation_checkpointing
        assert not base.model.get_input_embeddings()._forward_hooks
    (first, second), checkpointed, first_alone = calls
    assert checkpointed == [first + 3, second + 3]  # in every step a layer runs again in the backward pass
    assert first_alone == [first + 3, second]
    assert_close_and_moved(results[0], results[1], base, recipe, data)
    assert_close_and_moved(results[0], results[2], base, recipe, data)


def test_more_layers_to_recompute_than_there_are_are_refused(make_recipe: Make, load: Load, tmp_path: Path) -> None:
    recipe = make_recipe(train={"gradient_checkpointing": True, "recomputed_layers": 9})
    base, data = load(recipe)
    layers = base.model.config.num_hidden_layers
    with pytest.raises(ConfigError, match=f"recomputed_layers: 9, and .* has {layers}; leave it out to recompute all"):
        train_prefix(base, data.train, recipe, tmp_path, measure=measure, report=quiet)
    base.model.supports_gradient_checkpointing = False
    recipe = make_recipe(train={"gradient_checkpointing": True})
    with pytest.raises(ConfigError, match="gradient_checkpointing: .* cannot recompute its layers; leave it out"):
        train_prefix(base, data.train, recipe, tmp_path, measure=measure, report=quiet)
    with pytest.raises(ConfigError, match="recomputed_layers needs gradient_checkpointing, which recomputes them"):
        make_recipe(train={"recomputed_layers": 1})


def run_apart(recipe: Path, folder: Path, last: int, *fail_at: int) -> CompletedProcess[str]:
    """Train in a process of its own, see kill_me.py."""
    return processes.run(kill_me.main, str(recipe), str(folder), str(last), *map(str, fail_at))


LABELS = {"batch_size": 5}
STREAM = {"batch_size": 3, "accumulation": 2}
EPOCHS = {"batch_size": 8, "accumulation": 3, "schedule": "cosine", "warmup": 0.3}


@pytest.mark.parametrize(
    ("killed_at", "train", "fail_at"),
    [
        (1, {}, ()),  # before the first checkpoint
        (5, {}, ()),  # between two
        (6, EPOCHS, ()),  # in a later epoch, in the middle of accumulating
        (6, {}, (3,)),  # after a rollback, at half the rate
        (8, {}, ()),  # after the last step, before anything else was saved
        (6, LABELS, (3,)),  # where labels are learned: the head goes back and goes on too
        (6, STREAM, (3,)),  # where rows are read as they are needed: in the third window, after going back to the first
    ],
)
def test_a_run_killed_at_any_step_ends_in_the_same_prefix(
    make_recipe: Make,
    tiny_llama_dir: Path,
    tmp_path: Path,
    killed_at: int,
    train: dict[str, Any],
    fail_at: tuple[int, ...],
) -> None:
    recipe = tmp_path / "recipe.yaml"
    base = load_base_model(str(tiny_llama_dir), dtype="float32")
    with torch.no_grad():
        base.model.model.layers[1].self_attn.v_proj.weight.mul_(8)  # so that units are not all 1
    for part in (base.model, base.tokenizer):
        part.save_pretrained(tmp_path / "base")
    model = {"base": str(tmp_path / "base"), "dtype": "float32"}
    data: dict[str, Any] = {"format": "classes", "keep_label": None, "prompt": ""} if train is LABELS else {}
    data |= {"stream": True, "stream_head": 120, "stream_window": 18} if train is STREAM else {}
    prefix = {"reparam_depth": 2, "reparam_width": 8, "init": {"scaled": True}}
    sections = make_recipe(model=model, prefix=prefix, train=train, data=data)
    recipe.write_text(dump_recipe(sections), encoding="utf-8")
    whole = run_apart(recipe, tmp_path / "whole", -1, *fail_at)
    assert whole.returncode == 0, whole.stderr
    killed = run_apart(recipe, tmp_path / "killed", killed_at, *fail_at)
    assert killed.returncode == -9
    resumed = run_apart(recipe, tmp_path / "killed", -1, *fail_at)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout) == json.loads(whole.stdout)
    found = json.loads(whole.stdout)
    assert [line["step"] for line in found["metrics"]] == list(range(9))
    assert (found["steps"], found["best_step"], found["rollbacks"]) == (8, 8, len(fail_at))


def test_the_recipe_alone_says_whether_precision_is_mixed(make_recipe: Make, tmp_path: Path) -> None:
    """`accelerate launch` leaves the setting of its user in the environment."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(make_recipe()), encoding="utf-8")
    told = []
    for name, environ in (("plain", {}), ("launched", {"ACCELERATE_MIXED_PRECISION": "bf16"})):
        done = processes.run(kill_me.main, str(recipe), str(tmp_path / name), "-1", environ=environ)
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout))
    assert told[0] == told[1]


@pytest.mark.parametrize("train", [{}, {"steps": 30, "evaluate_every": 1, "patience": 3, "checkpoint_every": 1}])
def test_a_run_that_is_over_is_not_trained_further(
    make_recipe: Make, load: Load, tmp_path: Path, train: dict[str, Any]
) -> None:
    """At its last step, or stopped early: transformers' Trainer itself would take one more step."""
    recipe = make_recipe(train=train)
    base, data = load(recipe)
    losses = iter([5.0, 4.0, 3.0, 3.1, 3.2, 3.3])

    def scripted(trained: Trained) -> float:
        return next(losses) if train else measure(trained)

    first = train_prefix(base, data.train, recipe, tmp_path, measure=scripted, report=quiet)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = train_prefix(base, data.train, recipe, tmp_path, measure=scripted, report=quiet)
    assert (again.steps, again.best_step, again.best_loss) == (first.steps, first.best_step, first.best_loss)
    assert (again.tokens, again.seconds) == (first.tokens, first.seconds)
    assert torch.equal(again.trained.states.sites[0].key, first.trained.states.sites[0].key)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_the_rate_warms_up_and_decays_as_asked(make_recipe: Make, load: Load, tmp_path: Path) -> None:
    """8 steps, 2 of warm-up: Trainer logs the rate of the step just taken."""
    expected = {
        "linear": [0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
        "cosine": [0, 1 / 2, 1, *(0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(1, 6))],
        "constant": [0, 1 / 2, 1, 1, 1, 1, 1, 1],
    }
    for schedule, shares in expected.items():
        recipe = make_recipe(train={"schedule": schedule, "warmup": 0.25, "learning_rate": 0.01})
        base, data = load(recipe)
        folder = tmp_path / schedule
        folder.mkdir()
        train_prefix(base, data.train, recipe, folder, measure=measure, report=quiet)
        rates = [line["learning_rate"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
        assert rates == pytest.approx([0.01 * share for share in shares])


def test_gradients_are_clipped(make_recipe: Make, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(train={"max_grad_norm": 1e-3, "steps": 2})
    base, data = load(recipe)
    norms = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW, *rest: Any, **options: Any) -> Any:
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))
        return step(self, *rest, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    train_prefix(base, data.train, recipe, tmp_path, measure=measure, report=quiet)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_a_heldout_loss_that_is_no_number_is_a_divergence(make_recipe: Make, load: Load, tmp_path: Path) -> None:
    recipe = make_recipe(train={"divergence": {"action": "stop"}})
    base, data = load(recipe)
    with pytest.raises(DivergedError, match="step 0: held-out loss is nan; lower train.learning_rate"):
        train_prefix(base, data.train, recipe, tmp_path, measure=lambda *_: math.nan, report=quiet)


def test_weights_that_became_too_great_for_a_loss_are_a_divergence_too(
    make_recipe: Make, load: Load, tmp_path: Path
) -> None:
    """The measurement itself refuses them; at step 0, where nothing was trained, what it says of them stands."""
    recipe = make_recipe(train={"divergence": {"action": "stop"}, "evaluate_every": 1})
    base, data = load(recipe)
    calls = 0

    def refuse(_: Trained) -> float:
        nonlocal calls
        calls += 1
        if calls > first:
            raise NotFiniteError("the loss of a text is nan")
        return 1.0

    first = 1
    with pytest.raises(DivergedError, match="step 1: held-out loss is nan; lower train.learning_rate"):
        train_prefix(base, data.train, recipe, tmp_path / "later", measure=refuse, report=quiet)
    first = calls
    with pytest.raises(NotFiniteError, match="the loss of a text is nan"):
        train_prefix(base, data.train, recipe, tmp_path / "at once", measure=refuse, report=quiet)


def test_a_diverging_run_rolls_back_with_half_the_rate_and_ends(
    make_recipe: Make, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    base, data = load(recipe)
    check, failed = Monitor.check, []

    def fail_once(self: Monitor, step: int, loss: float, grad_norm: float) -> None:
        if step == 6 and not failed:
            failed.append(step)
            loss = float("nan")
        check(self, step, loss, grad_norm)

    monkeypatch.setattr(Monitor, "check", fail_once)
    outcome = train_prefix(base, data.train, recipe, tmp_path, measure=measure, report=quiet)
    rates = {line["step"]: line["learning_rate"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line}
    assert outcome.rollbacks == 1
    assert outcome.steps == 8
    assert rates[5] == pytest.approx(0.5 * recipe.train.learning_rate * 4 / 8, rel=0.2)
    assert rates[5] < 0.5 * rates[4]


def test_a_run_that_keeps_diverging_stops_and_says_so(
    make_recipe: Make, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(train={"divergence": {"max_rollbacks": 1}})
    base, data = load(recipe)
    monkeypatch.setattr(Monitor, "check", lambda *_: (_ for _ in ()).throw(DivergedError("step 1: loss is nan")))
    with pytest.raises(DivergedError, match=r"step 1: loss is nan \(gave up after 1 rollbacks\)"):
        train_prefix(base, data.train, recipe, tmp_path, measure=measure, report=quiet)
    assert base.model.config._attn_implementation == "sdpa"


def test_a_full_disk_keeps_the_previous_checkpoint(
    make_recipe: Make, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    base, data = load(recipe)
    write = trainer.write_own

    def full(folder: Path, *rest: Any) -> None:
        write(folder, *rest)
        if folder.name == "checkpoint-4":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "write_own", full)
    with pytest.raises(TrainingError, match=r"cannot save a checkpoint at step 4: .*No space left.* --resume"):
        train_prefix(base, data.train, recipe, tmp_path, measure=measure, report=quiet)
    assert [path.name for path in checkpoints(checkpoint_folder(tmp_path))] == ["checkpoint-2"]
    assert not (checkpoint_folder(tmp_path) / "unfinished").exists()


def test_early_stopping_keeps_the_best_prefix(make_recipe: Make, load: Load, tmp_path: Path) -> None:
    recipe = make_recipe(train={"steps": 30, "evaluate_every": 2, "patience": 3})
    base, data = load(recipe)
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.6, 3.7, 0.0])
    seen = []

    def scripted(trained: Trained) -> float:
        seen.append(trained.states)
        return next(losses)

    outcome = train_prefix(base, data.train, recipe, tmp_path, measure=scripted, report=quiet)
    assert (outcome.best_step, outcome.best_loss, outcome.steps) == (4, 3.0, 10)
    assert torch.equal(outcome.trained.states.sites[0].key, seen[2].sites[0].key)


@pytest.mark.parametrize("depth", [0, 2])
def test_training_leaves_the_callers_random_numbers_and_environment_alone(
    make_recipe: Make, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    recipe = make_recipe(train={"steps": 2}, prefix={"reparam_depth": depth, "reparam_width": 8})
    base, data = load(recipe)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train_prefix(base, data.train, recipe, tmp_path, measure=measure, report=quiet)
    assert torch.equal(torch.rand(3), expected)
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_a_half_written_last_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 0}) + "\n" + '{"step": 1, "lo', encoding="utf-8")
    assert read_metrics(path) == [{"step": 0}]


def test_a_second_rollback_goes_further_back_than_the_first(make_recipe: Make, tmp_path: Path) -> None:
    """A checkpoint may have been saved between the step that did the damage and the one that showed it."""
    config = make_recipe(train={"divergence": {"max_rollbacks": 3}}).train
    folders = [tmp_path / "training" / "checkpoints" / f"checkpoint-{step}" for step in (2, 4)]
    for folder in folders:
        folder.mkdir(parents=True)
    progress, tried = Progress(), set[Path]()
    progress = _roll_back(DivergedError("step 5: loss is nan"), progress, config, tmp_path, tried)
    assert [folder.exists() for folder in folders] == [True, True]
    progress = _roll_back(DivergedError("step 5: loss is nan"), progress, config, tmp_path, tried)
    assert [folder.exists() for folder in folders] == [True, False]
    folders[1].mkdir()  # training came so far again
    progress = _roll_back(DivergedError("step 5: loss is nan"), progress, config, tmp_path, tried)
    assert [folder.exists() for folder in folders] == [True, True]
    assert progress.rollbacks == 3


def test_one_process_trains_on_one_device(
    make_recipe: Make, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several GPUs the trainer would make replicas of the model, which read no prefix."""
    recipe = make_recipe()
    base, _ = load(recipe)
    made = _arguments(recipe.train, tmp_path, 0.01, base, may_miss=False)
    assert made.n_gpu <= 1
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda own: getattr(own, "_n_gpu", 0) or 4))
    assert _arguments(recipe.train, tmp_path, 0.01, base, may_miss=False)._n_gpu == 1
