"""`get_peft_model(base, [prefix_config, lora_config])`: the lab page's call, with both parts at work."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from peft import get_peft_model as peft_model
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from prefixkit.config import MethodConfig, PrefixConfig
from prefixkit.errors import ArtefactError, BaseMismatchError, ConfigError
from prefixkit.injection import attach
from prefixkit.methods import build_delta
from prefixkit.models.fingerprint import fingerprint, weights_hash
from prefixkit.models.inspect import inspect_model
from prefixkit.peft import HybridModel, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from prefixkit.prefix import BaseCard, Prefix, PrefixEncoder

Make = Callable[..., Any]
PREFIX = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


@pytest.fixture
def base(make_tiny_llama: Make) -> PreTrainedModel:
    return make_tiny_llama()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))


def make(base: PreTrainedModel, other: Any = None) -> Any:
    other = other or LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        prefix_config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
        model = get_peft_model(base, [prefix_config, other])
        with torch.no_grad():
            for number in model.delta.numbers:
                number.add_(0.2 * torch.randn_like(number))
    return model


@pytest.mark.parametrize("other", [None, IA3Config(task_type="CAUSAL_LM")])
def test_both_parts_answer_as_a_prefix_attached_to_pefts_model(
    other: Any, make_tiny_llama: Make, base: PreTrainedModel, ids: Tensor
) -> None:
    config = other or LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    model = make(base, other).eval()
    rival = peft_model(make_tiny_llama(), config).eval()
    with torch.no_grad():
        for name, number in rival.base_model.model.named_parameters():
            if number.requires_grad:
                number.copy_(model.delta.named()[name.replace(".default", "")])
    prefix = model.prefix.without(str(model.delta.method))
    with attach(rival, prefix), torch.no_grad():
        expected = rival(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_parts_are_turned_off_at_run_time_and_the_base_model_comes_back(base: PreTrainedModel, ids: Tensor) -> None:
    before, weights = base(ids).logits, weights_hash(base)
    model = make(base).eval()
    both = model(ids).logits
    with model.disable_part("lora"):
        prefix_alone = model(ids).logits
        with model.disable_part("prefix"):
            torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
    with model.disable_part("prefix"):
        lora_alone = model(ids).logits
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, both)
    found = [both, prefix_alone, lora_alone, before]
    assert all((one - other).abs().max() > 1e-3 for i, one in enumerate(found) for other in found[:i])
    with pytest.raises(ConfigError, match="no part ia3 here, only prefix and lora"), model.disable_part("ia3"):
        pass
    assert model.unload() is base
    assert torch.equal(base(ids).logits, before)
    assert weights_hash(base) == weights


def test_turning_a_part_off_puts_nothing_back_in(base: PreTrainedModel, ids: Tensor) -> None:
    before = base(ids).logits
    model = make(base).eval()
    both = model(ids).logits
    with model.disable_adapter():
        with model.disable_part("lora"):
            assert torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)
    with model.disable_part("lora", "prefix"), model.disable_adapter():
        assert torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, both)
    model.unload()
    with model.disable_part("lora"):
        assert torch.equal(base(ids).logits, before)
    assert torch.equal(base(ids).logits, before)


@pytest.mark.parametrize("method", ["prefix+bitfit", "prefix+full"])
def test_a_hybrid_in_another_format_has_the_numbers_it_trains(
    method: str, make_tiny_gpt2: Make, tmp_path: Path
) -> None:
    base = make_tiny_gpt2().to(torch.bfloat16)
    config = PrefixConfig(num_virtual_tokens=3)
    encoder = PrefixEncoder(inspect_model(base).geometry, [config.num_virtual_tokens] * 2)
    delta = build_delta(base, MethodConfig.model_validate(method), torch.Generator().manual_seed(0))
    model = HybridModel(base, encoder, delta)
    expected = encoder.num_parameters() + delta.num_parameters()
    assert model.get_nb_trainable_parameters()[0] == expected
    optimiser = torch.optim.AdamW(model.parameters())
    assert sum(n.numel() for group in optimiser.param_groups for n in group["params"] if n.requires_grad) == expected
    model.unload()


def test_a_hybrid_in_float64_stays_in_it(make_tiny_llama: Make, ids: Tensor, tmp_path: Path) -> None:
    base = make_tiny_llama().double()
    states = make(make_tiny_llama()).encoder.materialise().map(lambda tensor: tensor.double() / 3)
    delta = build_delta(base, MethodConfig.model_validate("lora"), torch.Generator().manual_seed(0)).materialise()
    prefix = Prefix.from_states(states, base=BaseCard(id="tiny", fingerprint=fingerprint(base)), deltas=[delta])
    prefix.save(tmp_path)
    with attach(base, prefix):
        expected = base(ids).logits
    again = HybridModel.from_pretrained(base, tmp_path)
    assert torch.equal(again(ids).logits, expected)
    assert again.prefix.states.equals(states)


def test_a_state_goes_onto_its_own_base_model_alone_and_brings_its_position(make_tiny_llama: Make, ids: Tensor) -> None:
    model = make(make_tiny_llama())
    plain = model(ids).logits
    model = HybridModel(model.unload(), model.encoder, model.delta, position_offset=0)
    expected = model(ids).logits
    assert not torch.equal(expected, plain)
    fresh = make(make_tiny_llama())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids).logits, expected)
    with pytest.raises(BaseMismatchError, match="this artefact was trained on another base model"):
        make(make_tiny_llama(seed=1)).load_state_dict(model.state_dict())


def test_each_part_has_its_own_rate_and_learns(base: PreTrainedModel, ids: Tensor) -> None:
    model = make(base).train()
    start = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.Adam(model.parameter_groups(prefix=1e-2, lora=1e-3))
    losses = []
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss))
        if len(losses) == 1:
            far = {key: float((value - start[key]).abs().max()) for key, value in model.state_dict().items()}
    assert losses[1] < losses[0]
    assert far.pop("encoder.units") == 0
    assert {round(far[key], 4) for key in far if key.startswith("encoder.")} == {1e-2}
    assert {round(far[key], 5) for key in far if key.startswith("delta.")} == {1e-3}
    trained, _ = model.get_nb_trainable_parameters()
    assert trained == model.encoder.num_parameters() + model.delta.num_parameters()
    for rates in ({"prefix": 1e-2}, {"prefix": 1e-2, "lora": 1e-3, "bitfit": 1e-3}):
        with pytest.raises(ConfigError, match="expected a rate for prefix and lora"):
            model.parameter_groups(**rates)


def test_it_is_saved_and_loaded_as_one(
    make_tiny_llama: Make, base: PreTrainedModel, ids: Tensor, tmp_path: Path
) -> None:
    model = make(base).eval()
    model.save_pretrained(tmp_path)
    expected = model(ids).logits
    other = make_tiny_llama()
    again = HybridModel.from_pretrained(other, tmp_path)
    assert torch.equal(again(ids).logits, expected)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    text = again.generate(ids, do_sample=False, max_new_tokens=5)
    again.unload()
    with attach(other, Prefix.load(tmp_path)):
        assert torch.equal(other(ids).logits, expected)
        assert torch.equal(other.generate(ids, do_sample=False, max_new_tokens=5), text)
    more = HybridModel.from_pretrained(other, tmp_path, is_trainable=True)
    more(input_ids=ids, labels=ids).loss.backward()
    assert all(number.grad is not None for number in [*more.encoder.parameters(), *more.delta.parameters()])


def test_the_base_model_keeps_its_name(make_tiny_llama: Make, base: PreTrainedModel, tmp_path: Path) -> None:
    named = PrefixTuningConfig(task_type="CAUSAL_LM", base_model_name_or_path="us/tiny", revision="v1")
    model = get_peft_model(base, [named, LoraConfig(r=2)])
    assert (model.prefix.card.base.id, model.prefix.card.base.revision) == ("us/tiny", "v1")
    model.save_pretrained(tmp_path)
    again = HybridModel.from_pretrained(make_tiny_llama(), tmp_path, is_trainable=True)
    assert again.prefix.card.base == model.prefix.card.base
    assert make(make_tiny_llama()).prefix.card.base.id == "LlamaForCausalLM"


def test_trainer_passes_on_the_same_columns_as_to_a_prefix_alone(base: PreTrainedModel) -> None:
    """Trainer drops what forward does not name: without its mask, an encoder-decoder's decoder would read padding."""
    found = inspect.signature(HybridModel.forward).parameters
    assert found == inspect.signature(PeftModel.forward).parameters
    assert {"position_ids", "decoder_attention_mask"} <= set(found)
    model = make(base)
    assert model.get_base_model() is base
    assert model.generation_config is base.generation_config


def test_gradient_checkpointing_is_turned_on_and_off_by_either_name(base: PreTrainedModel) -> None:
    model = make(base)
    for kind in ("activation", "gradient"):
        getattr(model, f"{kind}_checkpointing_enable")()
        assert base.is_activation_checkpointing
        getattr(model, f"{kind}_checkpointing_disable")()
        assert not base.is_activation_checkpointing


def test_gradient_checkpointing_changes_no_gradient(base: PreTrainedModel, ids: Tensor) -> None:
    model = make(base).train()
    found = []
    for on in (False, True):
        if on:
            model.activation_checkpointing_enable()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([number.grad.clone() for number in [*model.encoder.parameters(), *model.delta.parameters()]])
        for number in model.parameters():
            number.grad = None
    torch.testing.assert_close(found[0], found[1])


def test_transformers_trainer_trains_both_and_resumes(
    make_tiny_llama: Make, base: PreTrainedModel, ids: Tensor, tmp_path: Path
) -> None:
    rows = [{"input_ids": ids[i % 2], "labels": ids[i % 2]} for i in range(8)]

    def train(model: Any, folder: str, steps: int, resume: bool = False) -> Any:
        options = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=steps, per_device_train_batch_size=2, use_cpu=True, seed=1,
            save_steps=2, report_to="none", disable_tqdm=True, lr_scheduler_type="constant", learning_rate=1e-2,
        )  # fmt: skip
        trainer = Trainer(model, options, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return {key: value.clone() for key, value in model.state_dict().items()}

    model = make(base)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    whole = train(model, "whole", 4)
    train(make(make_tiny_llama()), "half", 2)
    resumed = train(make(make_tiny_llama()), "half", 4, resume=True)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    trained = whole.keys() - {"encoder.units", "base_fingerprint", "position_offset"}
    assert all((whole[key] - start[key]).abs().max() > 1e-3 for key in trained)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([], "a hybrid is prefixkit's PrefixTuningConfig and PEFT's LoraConfig or IA3Config, got nothing"),
        ([LoraConfig(), IA3Config()], "got LoraConfig, IA3Config"),
        ([PREFIX, LoraConfig(use_dora=True)], "LoraConfig.use_dora=True is not done"),
        ([PREFIX, LoraConfig(init_lora_weights=False)], "LoraConfig.init_lora_weights=False is not done"),
        ([PREFIX, LoraConfig(lora_alpha=0)], "r and lora_alpha: expected more than 0"),
        ([PREFIX, LoraConfig(layers_to_transform=0)], "LoraConfig.layers_to_transform=0 is not done"),
        ([PREFIX, LoraConfig(bias="all")], "LoraConfig.bias='all' is not done"),
        ([PREFIX, LoraConfig(target_modules="all-linear")], "give a list of names"),
        ([PREFIX, IA3Config(target_modules=["q_proj"], feedforward_modules=[])],
         "IA3Config.target_modules=.*'q_proj'.* is not done"),
    ],
)  # fmt: skip
def test_other_combinations_are_refused(configs: list[Any], message: str, base: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(base, configs)


def test_an_artefact_that_is_no_hybrid_is_refused(base: PreTrainedModel, tmp_path: Path) -> None:
    model = make(base)
    card = BaseCard(id="tiny", fingerprint=fingerprint(make_plain(model)))
    Prefix.from_states(model.prefix.states, base=card).save(tmp_path)
    with pytest.raises(ArtefactError, match="expected a prefix and one other part, found prefix"):
        HybridModel.from_pretrained(base, tmp_path)


def make_plain(model: Any) -> PreTrainedModel:
    base: PreTrainedModel = model.unload()
    return base


def test_an_artefact_without_virtual_tokens_has_no_configuration_of_a_prefix(
    make_tiny_llama: Make, tmp_path: Path
) -> None:
    """What is wrong is not a number that nobody gave."""
    base = make_tiny_llama()
    states = make(make_tiny_llama()).encoder.materialise()
    delta = build_delta(base, MethodConfig.model_validate("bitfit"), torch.Generator().manual_seed(0)).materialise()
    prefix = Prefix.from_states(states, base=BaseCard(id="tiny", fingerprint=fingerprint(base)), deltas=[delta])
    prefix.without("prefix").save(tmp_path)
    with pytest.raises(
        ArtefactError, match="the artefact of tiny holds bitfit and no prefix; attach it with prefixkit"
    ):
        PrefixTuningConfig.from_pretrained(tmp_path)
