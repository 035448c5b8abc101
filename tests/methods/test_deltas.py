"""Each method computes what its paper's formula, or PEFT, computes; starts as the base model; and leaves no trace."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.conftest import METHODS, config_of
from prefixkit.config import Method
from prefixkit.injection import attach
from prefixkit.methods import DeltaModule, build_delta, restore_delta
from prefixkit.methods.bitfit import own_biases
from prefixkit.models.fingerprint import fingerprint, weights_hash
from prefixkit.models.weights import all_modules

Make = Callable[..., Any]
FAMILIES = ("gpt2", "llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "opt", "gpt-neox")))


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, make_model: Make) -> PreTrainedModel:
    return make_model(request.param, fresh=True)


def skip_impossible(model: PreTrainedModel, name: str) -> None:
    if name == "parallel" and model.config.model_type == "opt":
        pytest.skip("refused: OPT's feed-forward network is no module of its own (tested below)")


def graded(model: Any, ids: Tensor, numbers: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the gradients of some function of them."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    dice = torch.Generator().manual_seed(9)
    weights = torch.randn(logits.shape, generator=dice, dtype=logits.dtype)
    return logits, list(torch.autograd.grad((logits * weights).sum(), numbers))


def with_delta(model: PreTrainedModel, delta: DeltaModule, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    with attach(model, None, deltas=[delta]):
        return graded(model, ids, list(delta.numbers))


def assert_same(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(one[1], other[1], rtol=1e-10, atol=1e-10)
    moved = [float(gradient.abs().max()) > 1e-9 for gradient in one[1]]  # the bias of OPT's keys changes no softmax
    assert sum(moved) > 0.8 * len(moved)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("all_float64")
def test_at_its_start_nothing_changes_and_nothing_is_left_behind(
    model: PreTrainedModel, name: str, make_ids: Make, make_delta: Make
) -> None:
    skip_impossible(model, name)
    ids = make_ids(2, 7)
    before, weights, identity = model(ids).logits, weights_hash(model), fingerprint(model)
    modules, required = list(map(id, all_modules(model))), [p.requires_grad for p in model.parameters()]
    delta = build_delta(model, config_of(name), torch.Generator().manual_seed(0))
    with attach(model, None, deltas=[delta]):
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-10, atol=1e-10)
    moved = make_delta(model, name)
    with attach(model, None, deltas=[moved]):
        assert (model(ids).logits - before).abs().max() > 1e-3
    assert torch.equal(model(ids).logits, before)
    assert (weights_hash(model), fingerprint(model)) == (weights, identity)
    assert list(map(id, all_modules(model))) == modules
    assert [p.requires_grad for p in model.parameters()] == required
    assert not hasattr(model, "peft_config")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def as_peft(model: PreTrainedModel, delta: DeltaModule, config: Any) -> PeftModel:
    """The same numbers in PEFT's own model."""
    rival = get_peft_model(copy.deepcopy(model), config).double().eval()
    own = {name: number for name, number in rival.base_model.model.named_parameters() if number.requires_grad}
    with torch.no_grad():
        for name, number in own.items():
            number.copy_(delta.named()[name.replace(".default", "")])
    assert len(own) == len(delta.numbers)
    return rival


@pytest.mark.parametrize("name", ["lora", "ia3"])
@pytest.mark.usefixtures("all_float64")
def test_lora_and_ia3_equal_peft(model: PreTrainedModel, name: str, make_ids: Make, make_delta: Make) -> None:
    skip_impossible(model, name)
    delta, ids = make_delta(model, name), make_ids(3, 6)
    config = LoraConfig(r=2, lora_alpha=4.0) if name == "lora" else IA3Config()
    rival = as_peft(model, delta, config)
    numbers = [number for number in rival.parameters() if number.requires_grad]
    assert_same(with_delta(model, delta, ids), graded(rival, ids, numbers))


@pytest.mark.parametrize("name", ["bitfit", "full", "top-layers"])
@pytest.mark.usefixtures("all_float64")
def test_bitfit_and_fine_tuning_equal_a_model_whose_weights_are_changed(
    model: PreTrainedModel, name: str, make_ids: Make, make_delta: Make
) -> None:
    if name == "bitfit" and not own_biases(model):
        pytest.skip("has no biases of its own; where they are added is tested below")
    delta, ids = make_delta(model, name), make_ids(3, 6)
    rival = copy.deepcopy(model).requires_grad_(True)
    own = dict(rival.named_parameters())
    with torch.no_grad():
        for key, number in delta.named().items():
            own[key].copy_(number)
    expected = {
        "bitfit": {key for key in own if key.endswith("bias")},
        "full": set(own),
        "top-layers": {key for key in own if ".2." in key},
    }[name]
    assert set(delta.named()) == expected
    assert_same(with_delta(model, delta, ids), graded(rival, ids, [own[key] for key in delta.named()]))


class _Adapter(nn.Module):
    """The papers' formulas, as slowly and as plainly as they can be written."""

    def __init__(self, inner: nn.Module, numbers: list[Tensor], scale: float, *, is_parallel: bool) -> None:
        super().__init__()
        self.inner, self.numbers, self.scale, self.is_parallel = inner, numbers, scale, is_parallel

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        read = args[0] if self.is_parallel else hidden
        down, down_bias, up, up_bias = self.numbers
        inner = (read @ down.T + down_bias).clamp_min(0)
        changed = hidden + self.scale * (inner @ up.T + up_bias)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.usefixtures("all_float64")
def test_adapters_equal_their_formulas(model: PreTrainedModel, name: str, make_ids: Make, make_delta: Make) -> None:
    skip_impossible(model, name)
    delta, ids = make_delta(model, name), make_ids(3, 6)
    rival = copy.deepcopy(model)
    numbers = delta.named()
    places = {"after_attention": "attention", "after_network": "network", "beside_network": "network"}
    inner = {
        "gpt2": ("attn", "mlp"), "gpt_neox": ("attention", "mlp"), "opt": ("self_attn", "fc2"),
    }.get(model.config.model_type, ("self_attn", "mlp"))  # fmt: skip
    groups: dict[str, list[Tensor]] = {}
    for key, number in numbers.items():
        groups.setdefault(key.rsplit(".", 2)[0], []).append(number)
    scale = 4.0 if name == "parallel" else 1.0
    for place, own in groups.items():
        layer, _, which = place.rpartition(".")
        child = inner[0] if places[which] == "attention" else inner[1]
        parent = rival.get_submodule(layer)
        wrapped = _Adapter(getattr(parent, child), own, scale, is_parallel=name == "parallel")
        setattr(parent, child, wrapped)
    assert len(groups) == len(numbers) / 4 == model.config.num_hidden_layers * (2 if name == "houlsby" else 1)
    assert_same(with_delta(model, delta, ids), graded(rival, ids, list(numbers.values())))


@pytest.mark.usefixtures("all_float64")
def test_added_biases_equal_linear_layers_with_biases(model: PreTrainedModel, make_ids: Make, make_delta: Make) -> None:
    delta, ids = make_delta(model, "bitfit-added"), make_ids(3, 6)
    rival = copy.deepcopy(model)
    for key, bias in delta.named().items():
        layer: Any = rival.get_submodule(key.rpartition(".")[0])
        own = layer.forward
        layer.forward = partial(lambda own, bias, x: own(x) + bias, own, bias)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D") and m is not head]
    assert len(delta.numbers) == len(linear)
    assert_same(with_delta(model, delta, ids), graded(rival, ids, list(delta.numbers)))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("all_float64")
def test_gradient_checkpointing_changes_nothing(name: str, make_model: Make, make_ids: Make, make_delta: Make) -> None:
    model = make_model("gpt2", fresh=True)
    delta, ids = make_delta(model, name), make_ids(2, 6)
    plain = with_delta(model, delta, ids)
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_same(with_delta(model, delta, ids), plain)


@pytest.mark.parametrize("name", ["full", "top-layers", "bitfit"])
def test_weights_in_bfloat16_are_trained_in_float32(
    name: str, make_model: Make, make_ids: Make, make_delta: Make
) -> None:
    """A step of 1e-5 is lost in a bfloat16 weight of 1, and must not be."""
    model = make_model("gpt2", fresh=True).to(torch.bfloat16)
    delta, ids = make_delta(model, name, size=0.0), make_ids(2, 6)
    before = model(ids).logits
    assert {number.dtype for number in delta.numbers} == {torch.float32}
    with attach(model, None, deltas=[delta]):
        assert torch.equal(model(ids).logits, before)
        loss = model(ids).logits.float().square().mean()
        loss.backward()
        assert model(ids).logits.dtype == torch.bfloat16
        with torch.no_grad():
            model(ids)  # a pass without gradients in between leaves no frozen weights behind
        again = torch.autograd.grad(model(ids).logits.float().square().mean(), list(delta.numbers))
    for number, gradient in zip(delta.numbers, again, strict=True):
        torch.testing.assert_close(number.grad, gradient)
    with torch.no_grad():
        for number in delta.numbers:
            number.add_(1e-5)
    assert all(bool((number != start.float()).any()) for number, start in
               zip(delta.numbers, (dict(model.named_parameters())[n] for n in delta.named()), strict=True))  # fmt: skip
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("all_float64")
def test_what_is_saved_is_restored_and_does_not_change_with_later_steps(
    model: PreTrainedModel, name: str, make_ids: Make, make_delta: Make
) -> None:
    skip_impossible(model, name)
    delta, ids = make_delta(model, name), make_ids(2, 5)
    saved, numbers = delta.materialise(), delta.num_parameters()
    with attach(model, None, deltas=[delta]):
        expected = model(ids).logits
    with torch.no_grad():
        for number in delta.numbers:
            number.zero_()
    again = restore_delta(model, saved)
    assert saved.num_parameters == numbers == again.num_parameters()
    assert not any(number.requires_grad for number in again.numbers)
    undo = again.insert()
    assert torch.equal(model(ids).logits, expected) or (model(ids).logits - expected).abs().max() < 1e-12
    undo()


@pytest.mark.parametrize("name", METHODS)
def test_its_start_comes_from_the_generator_alone(name: str, make_model: Make) -> None:
    model, config = make_model("llama", fresh=True), config_of(name)
    before = torch.get_rng_state()
    one, same, other = (build_delta(model, config, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(*pair) for pair in zip(one.numbers, same.numbers, strict=True))
    draws = name in ("lora", "houlsby", "pfeiffer", "parallel")
    assert any(not torch.equal(*pair) for pair in zip(one.numbers, other.numbers, strict=True)) == draws
    assert one.settings.keys() == config.settings.keys()  # made anew as from what was saved
    if config.kind is Method.ADAPTER:
        bound = max(float(number.abs().max()) for key, number in one.named().items() if key.endswith("down.weight"))
        assert 0.8 * 32**-0.5 < bound <= 32**-0.5
