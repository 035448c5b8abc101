"""Learning labels: a prefix and a classification head, trained together on a frozen model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from prefixkit.config import Pooling, Recipe
from prefixkit.data import NO_LOSS, Collator
from prefixkit.errors import DivergedError
from prefixkit.injection import attach
from prefixkit.models import Base
from prefixkit.models.fingerprint import weights_hash
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import (
    BaseCard,
    ClassificationHead,
    Head,
    HeadKind,
    Prefix,
    PrefixEncoder,
    init_random,
)
from prefixkit.training import checkpoint_folder, checkpoints, read_metrics, train_prefix
from prefixkit.training.checkpoint import read_own
from prefixkit.training.model import PrefixModel, Trained
from prefixkit.training.monitor import Monitor
from prefixkit.training.start import build_head

Make = Callable[..., Recipe]
LABELLED = {"format": "classes", "keep_label": None, "prompt": ""}


def measure(trained: Trained) -> float:
    assert trained.head is not None
    return float(trained.head.weight.square().mean())


def quiet(*_: Any) -> None:
    """Say nothing."""


def tiny_bert() -> BertModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                            intermediate_size=16, max_position_embeddings=32, initializer_range=0.3)  # fmt: skip
        return BertModel(config, add_pooling_layer=False).double().eval()


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [(HeadKind.SEQUENCE, Pooling.TOKEN), (HeadKind.SEQUENCE, Pooling.MEAN), (HeadKind.TOKEN, Pooling.TOKEN)],
)
def test_the_loss_of_labels_and_its_gradients_are_those_of_the_obvious_sum(kind: HeadKind, pooling: Pooling) -> None:
    """A padded batch against each row by itself, unpadded, with the softmax written out."""
    base, dice = tiny_bert(), torch.Generator().manual_seed(1)
    geometry = inspect_model(base).geometry
    encoder = PrefixEncoder(geometry, geometry.lengths(3), dtype=torch.float64)
    init_random(encoder, dice, std=1.0)
    head = ClassificationHead(kind, ("a", "b", "c"), 16, pooling=pooling, generator=dice, dtype=torch.float64)
    with torch.no_grad():
        head.bias.add_(torch.randn(3, generator=dice, dtype=torch.float64))
    rows = [torch.randint(3, 40, (length,), generator=dice) for length in (7, 4, 5)]
    places = [[0], [0], [0]] if kind is HeadKind.SEQUENCE else [[1, 3, 6], [2], []]
    classes = [[2], [0], [1]] if kind is HeadKind.SEQUENCE else [[2, 0, 1], [1], []]
    ids, labels, mask = (torch.zeros(3, 7, dtype=torch.long) for _ in range(3))
    labels.fill_(NO_LOSS)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, places[row]] = torch.tensor(classes[row], dtype=torch.long)
    model = PrefixModel(base, encoder, None, head).eval()
    loss = model(input_ids=ids, attention_mask=mask, labels=labels)["loss"]
    loss.backward()
    found = [parameter.grad.clone() for parameter in (*encoder.parameters(), *head.parameters())]
    model.zero_grad()
    model._handle.detach()

    total, count = torch.zeros((), dtype=torch.float64), 0
    for tokens, at, true in zip(rows, places, classes, strict=True):
        with attach(base, encoder):
            hidden = base(input_ids=tokens[None]).last_hidden_state[0]  # [t, e]
        for place, each in zip(at, true, strict=True):
            state = hidden.mean(0) if pooling is Pooling.MEAN else hidden[place]
            logits = head.weight @ state + head.bias
            total = total + logits.exp().sum().log() - logits[each]
            count += 1
    torch.testing.assert_close(loss, total / count, atol=1e-10, rtol=0)
    (total / count).backward()
    for own, parameter in zip(found, (*encoder.parameters(), *head.parameters()), strict=True):
        torch.testing.assert_close(own, parameter.grad, atol=1e-10, rtol=0)
        assert own.abs().max() > 1e-6


def test_the_loss_is_divided_by_the_labels_of_the_whole_step() -> None:
    base, dice = tiny_bert(), torch.Generator().manual_seed(1)
    geometry = inspect_model(base).geometry
    head = ClassificationHead(HeadKind.SEQUENCE, ("a", "b"), 16, generator=dice, dtype=torch.float64)
    model = PrefixModel(base, PrefixEncoder(geometry, geometry.lengths(2), dtype=torch.float64), None, head).eval()
    batch = {"input_ids": torch.tensor([[3, 4], [5, 6]]), "attention_mask": torch.ones(2, 2, dtype=torch.long),
             "labels": torch.tensor([[0, NO_LOSS], [1, NO_LOSS]])}  # fmt: skip
    alone, of_ten = model(**batch)["loss"], model(**batch, num_items_in_batch=10)["loss"]
    torch.testing.assert_close(alone * 2, of_ten * 10)


def test_training_moves_prefix_and_head_and_nothing_else(
    make_recipe: Make, load: Callable[[Recipe], tuple[Base, Any]], tmp_path: Path
) -> None:
    steps = {"steps": 30, "learning_rate": 0.05, "checkpoint_every": 15, "patience": None}
    recipe = make_recipe(data=LABELLED, train=steps, head={"learning_rate": 0.01, "dropout": 0.2})
    base, data = load(recipe)
    before = weights_hash(base.model)
    few = data.train[:8]  # their labels are made up, and can only be learned by heart
    outcome = train_prefix(base, few, recipe, tmp_path, classes=data.classes, measure=measure, report=quiet)
    assert weights_hash(base.model) == before
    assert outcome.trained.head is not None
    assert outcome.trained.head.labels == ("neg", "pos")
    assert outcome.trained_parameters == sum(map(torch.numel, outcome.state.values())) - outcome.state["units"].numel()
    first, last = (read_own(path)[0] for path in checkpoints(checkpoint_folder(tmp_path)))
    assert {"head.weight", "head.bias"} < set(first)
    assert all((first[name] - last[name]).abs().max() > 1e-4 for name in first.keys() - {"units"})
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.2


def test_the_best_head_is_kept_with_the_best_prefix(
    make_recipe: Make, load: Callable[[Recipe], tuple[Base, Any]], tmp_path: Path
) -> None:
    recipe = make_recipe(data=LABELLED, train={"steps": 4, "evaluate_every": 1, "checkpoint_every": 1,
                                               "keep_checkpoints": 9}, head={"learning_rate": 0.1})  # fmt: skip
    base, data = load(recipe)
    losses = iter([9.0, 8.0, 1.0, 7.0, 7.0])
    outcome = train_prefix(base, data.train, recipe, tmp_path, classes=data.classes,
                           measure=lambda *_: next(losses), report=quiet)  # fmt: skip
    assert outcome.best_step == 2
    assert outcome.trained.head is not None
    at_two, at_four = (read_own(checkpoint_folder(tmp_path) / f"checkpoint-{step}")[0] for step in (2, 4))
    assert torch.equal(outcome.trained.head.weight, at_two["head.weight"])
    assert not torch.equal(outcome.trained.head.weight, at_four["head.weight"])


def test_head_and_prefix_have_rates_of_their_own_also_after_a_rollback(
    make_recipe: Make, load: Callable[[Recipe], tuple[Base, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"learning_rate": 0.02, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.1}
    encoder = {"reparam_depth": 1, "reparam_width": 8}
    recipe = make_recipe(data=LABELLED, prefix=encoder, head={"learning_rate": 0.004}, train=train)
    base, data = load(recipe)
    rates: list[list[float]] = []
    decays: list[list[tuple[int, float]]] = []
    check, failed = Monitor.check, []

    def watch(self: Monitor, step: int, loss: float, grad_norm: float) -> None:
        if step == 5 and not failed:
            failed.append(step)
            raise DivergedError("step 5: made up")
        check(self, step, loss, grad_norm)

    monkeypatch.setattr(Monitor, "check", watch)
    step = torch.optim.AdamW.step

    def record(self: torch.optim.AdamW, *args: Any, **options: Any) -> Any:
        rates.append([group["lr"] for group in self.param_groups])
        decays.append([(len(group["params"]), group["weight_decay"]) for group in self.param_groups])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    train_prefix(base, data.train, recipe, tmp_path, classes=data.classes, measure=measure, report=quiet)
    assert failed
    assert rates == [[0.02, 0.02, 0.004, 0.004]] * 4 + [[0.01, 0.01, 0.002, 0.002]] * 4
    # table and last layer, its bias; weight, bias of the head: biases do not decay
    assert decays == [[(2, 0.1), (1, 0.0), (1, 0.1), (1, 0.0)]] * 8


def test_a_batch_pads_labels_like_text(load: Callable[[Recipe], tuple[Base, Any]], make_recipe: Make) -> None:
    _, data = load(make_recipe(data=LABELLED))
    batch = Collator(0)(data.train[:3])
    assert batch["labels"].shape == batch["input_ids"].shape
    assert ((batch["labels"] != NO_LOSS).sum(1) == 1).all()


def test_a_run_that_starts_from_a_prefix_starts_from_its_head_too(
    make_recipe: Make, load: Callable[[Recipe], tuple[Base, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, data = load(make_recipe(data=LABELLED))
    geometry, dice = inspect_model(base.model).geometry, torch.Generator().manual_seed(3)
    encoder = PrefixEncoder(geometry, geometry.lengths(4))
    init_random(encoder, dice, std=1.0)
    saved = Head(HeadKind.SEQUENCE, data.classes, torch.randn(2, 32, generator=dice), torch.randn(2, generator=dice))
    Prefix.from_states(encoder.materialise(), base=BaseCard(id="tiny"), head=saved).save(tmp_path / "first")
    recipe = make_recipe(data=LABELLED, prefix={"init": {"kind": "prefix", "path": str(tmp_path / "first")}})
    assert torch.equal(build_head(base, recipe, data.classes).weight, saved.weight)
    caplog.set_level("INFO", logger="prefixkit")
    assert not torch.equal(build_head(base, recipe, ("x", "y")).weight, saved.weight)
    assert "has no head that reads these labels in this way; the head starts anew" in caplog.text
