"""What training costs, told before it begins: multiplications against the formula, time and memory against a run."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from prefixkit.cli.estimate import less_memory
from prefixkit.config import Recipe
from prefixkit.lab import cost as cost_module
from prefixkit.lab.cost import Cost, estimate_run, matmul_rate, measure_cost
from prefixkit.lab.run.loading import load_for
from processes import prefixkit


def test_the_flops_of_a_step_are_those_of_its_products(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_module, "_TRIED", 0.01)
    same = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"batch_size": 4, "accumulation": 3}),
            "data": recipe.data.model_copy(update={"max_tokens": 6, "min_words": 8, "max_words": None}),
        }
    )
    base, data = load_for(same)
    assert {example.num_tokens for example in data.train} == {6}  # so that there is no padding
    found = measure_cost(base, data.train, same, ())
    config, p, t, b = base.model.config, same.prefix.num_virtual_tokens, 6, 4
    linear = sum(module.weight.numel() for name, module in base.model.named_modules()
                 if isinstance(module, nn.Linear) and "lm_head" not in name)  # fmt: skip
    head, scored = base.model.lm_head.weight.numel(), sum(label != -100 for label in data.train[0].labels[1:])
    first = base.model.model.layers[0].self_attn
    unread = sum(layer.weight.numel() for layer in (first.q_proj, first.k_proj, first.v_proj))
    products = 4 * b * (t * linear + scored * head)  # forwards, and backwards for the input
    products -= 2 * b * t * unread  # nothing learns from what the first layer is given
    attention = 2 * b * config.num_hidden_layers * config.hidden_size * t * (p + t)  # one product of scores or values
    assert found.texts == 12
    assert found.tokens == 72
    assert found.flops / 3 == products + 7 * attention  # two forwards, five backwards, as scores are computed again
    assert found.trained == 2 * p * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert found.peak_checkpointed <= found.peak


def test_nothing_of_the_steps_is_kept(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_module, "_TRIED", 0.01)
    before = torch.get_num_threads()
    base, cost = estimate_run(recipe)
    torch.set_num_threads(before)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in base.model.parameters())
    assert not base.model.model.layers[0].self_attn._forward_hooks
    assert cost.seconds > 0
    assert matmul_rate(base, tokens=3) > 0


def test_time_elsewhere_follows_from_its_rate_by_the_same_share() -> None:
    cost = Cost(steps=10, texts=8, tokens=100.0, flops=2e9, seconds=4.0, rate=1e9, peak=0, peak_checkpointed=0,
                trained=1)  # fmt: skip
    assert cost.reached == 0.5
    assert cost.training_seconds == cost.seconds_at(1e9) == 40
    assert cost.seconds_at(4e9) == 10


def test_gradient_checkpointing_is_advised_where_it_takes_less() -> None:
    cost = Cost(steps=1, texts=1, tokens=1.0, flops=1.0, seconds=1.0, rate=1.0, peak=3 * 10**9,
                peak_checkpointed=2 * 10**9, trained=1)  # fmt: skip
    assert less_memory(cost) == ", 2.0 GB with train.gradient_checkpointing=true"
    assert less_memory(dataclasses.replace(cost, peak_checkpointed=3 * 10**9)) == ""


def test_the_command_says_it_in_words_and_in_numbers(sweep_recipe: str) -> None:
    path = sweep_recipe
    said = prefixkit("estimate", path, "--flops", "1e12").stdout
    assert [line.split()[0] for line in said.splitlines()] == [
        "step", "machine", "training", "memory", "trained", "elsewhere"
    ]  # fmt: skip
    numbers = json.loads(prefixkit("estimate", path, "--json", "--flops", "1e12").stdout)
    assert numbers["steps"] > 0
    expected = numbers["steps"] * numbers["flops"] / 1e12 / numbers["reached"]
    assert numbers["training_seconds_at"] == pytest.approx(expected)
    refused = prefixkit("estimate", path, "--flops", "-3")
    assert refused.returncode == 1
    assert refused.stderr.endswith("error: --flops: expected more than 0 FLOP/s, such as 300e12, got -3\n")
