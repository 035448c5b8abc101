"""PEFT's configuration is taken as it is, means what it means there, and is refused where it would mean nothing."""

import re
from typing import Any

import peft
import pytest
from transformers import PreTrainedModel

import prefixkit.peft
from prefixkit import PrefixTuningConfig, get_peft_model
from prefixkit.config import Activation, InitKind
from prefixkit.errors import ConfigError
from prefixkit.peft import PeftConfig, TaskType
from prefixkit.peft.arguments import LOADING, MAKING, SAVING, TUNING, Meaningless, check_others


def test_the_lab_pages_configuration_is_a_two_layer_tanh_mlp() -> None:
    config = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=20, prefix_projection=True, encoder_hidden_size=768
    )
    found = config.to_prefix_config(token_dim=192)
    assert (found.num_virtual_tokens, found.reparam_depth, found.reparam_width) == (20, 2, 768)
    assert found.reparam_activation is Activation.TANH
    assert found.init.kind is InitKind.WORDS


@pytest.mark.parametrize("task", ["CAUSAL_LM", TaskType.CAUSAL_LM, peft.TaskType.CAUSAL_LM])
def test_the_task_may_be_said_in_three_ways(task: Any) -> None:
    assert PrefixTuningConfig(task_type=task).task_type is TaskType.CAUSAL_LM
    assert {each.value for each in TaskType} == {each.value for each in peft.TaskType}


def test_every_argument_of_pefts_is_known() -> None:
    theirs = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    values = vars(theirs) | {"peft_type": theirs.peft_type}
    assert len(values) >= 16
    assert PrefixTuningConfig(**values).num_virtual_tokens == 7


def test_the_width_left_out_is_that_of_a_layers_key_as_in_peft() -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", prefix_projection=True)
    assert config.to_prefix_config(token_dim=64).reparam_width == 64
    assert config.to_prefix_config(token_dim=16).reparam_width == 20  # 20 virtual tokens that start from words
    assert PrefixTuningConfig(task_type="CAUSAL_LM").to_prefix_config(token_dim=16).reparam_depth == 0


@pytest.mark.parametrize(
    ("init_weights", "kind"), [(None, InitKind.WORDS), ("zero", InitKind.ZERO), ("random", InitKind.RANDOM)]
)
def test_the_start_is_ours_unless_asked_otherwise(init_weights: Any, kind: InitKind) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", init_weights=init_weights).to_prefix_config(16)
    assert config.init.kind is kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_type": None}, 'task_type: missing; give task_type="CAUSAL_LM", or "SEQ_2_SEQ_LM" for an encoder-dec'),
        ({"task_type": "CAUSAL"}, 'expected CAUSAL_LM or SEQ_2_SEQ_LM, got CAUSAL; did you mean "CAUSAL_LM"?'),
        (
            {"task_type": "SEQ_CLS"},
            "task_type: expected CAUSAL_LM or SEQ_2_SEQ_LM, got SEQ_CLS; a prefix with a head for labels is trained by",
        ),
        ({"num_virtual_token": 3}, 'num_virtual_token: unknown; did you mean "num_virtual_tokens"?'),
        ({"zzz": 3}, "PrefixTuningConfig: zzz: unknown; leave it out"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens: expected 1-4096, got 0"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens: expected 1-4096, got None"),
        ({"num_virtual_tokens": 5000}, "num_virtual_tokens: expected 1-4096, got 5000"),
        ({"token_dim": -1}, "token_dim: expected a number of at least 1, got -1"),
        ({"encoder_hidden_size": 8}, "encoder_hidden_size: has no effect without prefix_projection=True; set it, or"),
        ({"init_weights": "ones"}, 'init_weights: expected None, "zero" or "random", got \'ones\''),
        ({"peft_type": "LORA"}, "PrefixTuningConfig: peft_type='LORA': only PREFIX_TUNING is here"),
        ({"inference_mode": True}, "inference_mode=True: a new prefix is there to be trained; load a trained one"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules=2: a decoder-only model has one stack"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']: the base model stays frozen; train its"),
        ({"auto_mapping": {"a": 1}}, "auto_mapping={'a': 1}: PEFT fills it in itself; leave it out"),
    ],
)
def test_what_means_nothing_is_refused_with_a_suggestion(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        PrefixTuningConfig(**{"task_type": "CAUSAL_LM"} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 3}, "num_layers: this model has 2, got 3; leave it out"),
        ({"num_attention_heads": 4}, "num_attention_heads: this model has 2, got 4; leave it out"),
        ({"token_dim": 32}, "token_dim: this model has 16, got 32; leave it out"),
        (
            {"prefix_projection": True, "encoder_hidden_size": 3},
            "encoder_hidden_size: 3 is too narrow for 20 virtual tokens to start from words; use at least 20, leave it",
        ),
    ],
)
def test_sizes_are_checked_against_the_model(arguments: dict[str, Any], message: str, base: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", **arguments))
    right = {"num_layers": 2, "num_attention_heads": 2, "token_dim": 16}
    assert get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", **right)).encoder is not None


def test_names_that_are_not_here_say_where_to_look() -> None:
    with pytest.raises(
        ImportError, match="prefixkit.peft has no LoraConfig: only prefix tuning is here; import LoraConfig"
    ):
        from prefixkit.peft import LoraConfig  # noqa: F401
    with pytest.raises(ImportError, match="no AutoPeftModelForCausalLM: load the base model with transformers, then"):
        from prefixkit.peft import AutoPeftModelForCausalLM  # noqa: F401
    assert not hasattr(prefixkit_peft(), "something_else")
    assert PeftConfig is PrefixTuningConfig


def prefixkit_peft() -> Any:
    import prefixkit.peft

    return prefixkit.peft


def test_a_configuration_can_be_read_in_a_log() -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert repr(config) == (
        "PrefixTuningConfig(task_type=<TaskType.CAUSAL_LM: 'CAUSAL_LM'>, num_virtual_tokens=3, prefix_projection=False)"
    )


@pytest.mark.parametrize(
    ("name", "todo"),
    [
        ("PeftType", "there is prefix tuning alone"),
        ("get_peft_config", r"call PrefixTuningConfig\(...\) with the same arguments"),
        ("get_peft_model_state_dict", r"model.state_dict\(\) holds the prefix's parameters alone"),
        ("set_peft_model_state_dict", "takes what model.state_dict"),
        ("prepare_model_for_kbit_training", "needs no preparation; leave the call out"),
    ],
)
def test_names_without_a_counterpart_say_what_to_do(name: str, todo: str) -> None:
    with pytest.raises(ImportError, match=f"prefixkit.peft has no {name}: .*{todo}"):
        getattr(prefixkit.peft, name)


def test_a_configuration_says_all_it_holds() -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    told = config.to_dict()
    assert (told["peft_type"], told["task_type"], told["num_virtual_tokens"]) == ("PREFIX_TUNING", "CAUSAL_LM", 7)
    assert config.peft_type == "PREFIX_TUNING"
    assert PrefixTuningConfig(**{name: value for name, value in told.items() if value is not None}).to_dict() == told


@pytest.mark.parametrize("table", [TUNING, MAKING, LOADING, SAVING])
def test_arguments_that_mean_nothing_are_taken_at_the_values_that_mean_nothing(table: Meaningless) -> None:
    for key, (harmless, todo) in table.items():
        for value in harmless:
            check_others("call", {key: value}, table)
        with pytest.raises(ConfigError, match=re.escape(f"call: {key}='another': {todo}")):
            check_others("call", {key: "another"}, table)
    with pytest.raises(ConfigError, match="call: qqqq: unknown; leave it out"):
        check_others("call", {"qqqq": 1}, table)
