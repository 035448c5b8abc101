"""A script written for PEFT's prefix tuning does on prefixkit what it did on PEFT."""

import copy
import gc
import inspect
import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit import PeftModel, Prefix, PrefixTuningConfig, attach, get_peft_model
from prefixkit.errors import ArtefactError, BaseMismatchError, ConfigError, InjectionError, UnsupportedModelError
from prefixkit.models.fingerprint import weights_hash
from prefixkit.models.text_states import text_states
from prefixkit.peft import PeftConfig
from prefixkit.peft.arguments import LOADING, MAKING, SAVING
from prefixkit.prefix import BaseCard, Head, HeadKind, PrefixStates

P = 5
Batch = dict[str, Tensor]


def both(base: PreTrainedModel, **settings: Any) -> tuple[peft.PeftModel, PeftModel]:
    """PEFT's model and ours on copies of one base model, ours started from PEFT's random numbers."""
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P} | settings
    with torch.random.fork_rng():
        torch.manual_seed(7)
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.PrefixTuningConfig(**settings))
        ours = get_peft_model(base, PrefixTuningConfig(**settings, init_weights="random"))
    start, encoder = theirs.prompt_encoder["default"], ours.encoder
    with torch.no_grad():
        if settings.get("prefix_projection"):
            for own, given in (
                (encoder.table, start.embedding.weight),
                (encoder.hidden[0].weight, start.transform[0].weight),
                (encoder.hidden[0].bias, start.transform[0].bias),
                (encoder.last.weight, start.transform[2].weight),
                (encoder.last.bias, start.transform[2].bias),
            ):
                own.copy_(given)
        else:
            rows = start.embedding.weight.view(P, 2, 2, 2, 8)  # token, layer, key or value, KV head, head_dim
            for layer, pair in enumerate(encoder.states):
                pair.copy_(rows[:, layer].permute(1, 2, 0, 3))
    return theirs, ours


def train(model: nn.Module, batch: Batch, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def perturbed(base: PreTrainedModel, **settings: Any) -> PeftModel:
    """Ours, moved away from where it starts."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        model = get_peft_model(base, config)
        with torch.no_grad():
            for parameter in model.encoder.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found


@pytest.mark.parametrize("projection", [False, True])
def test_from_the_same_start_it_learns_what_peft_learns(
    projection: bool, base: PreTrainedModel, batch: Batch, tmp_path: Path
) -> None:
    theirs, ours = both(base, prefix_projection=projection)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    before = weights_hash(base)
    expected, found = train(theirs, batch), train(ours, batch)
    assert expected[0] - expected[-1] > 0.05
    # The prefix is float32 on both sides; AdamW's first steps amplify its rounding where a gradient is nearly zero.
    assert found == pytest.approx(expected, abs=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    saved = [
        load_file(tmp_path / side / "adapter_model.safetensors")["prompt_embeddings"] for side in ("theirs", "ours")
    ]
    torch.testing.assert_close(saved[1], saved[0], rtol=0, atol=1e-4)
    assert weights_hash(base) == before


def test_it_reports_trainable_parameters_in_pefts_words(
    base: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, ours = both(base, prefix_projection=True)
    theirs.print_trainable_parameters()
    expected = capsys.readouterr().out
    ours.print_trainable_parameters()
    assert capsys.readouterr().out == expected
    assert expected.startswith("trainable params: ")


def test_with_another_width_only_the_table_differs_from_pefts(base: PreTrainedModel) -> None:
    theirs, ours = both_sizes(base, width=24)
    token_dim, width = 16, 24
    assert theirs - ours == P * token_dim + token_dim * width - (P * width + width * width)


def both_sizes(base: PreTrainedModel, width: int) -> tuple[int, int]:
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P, "prefix_projection": True}
    ours = get_peft_model(base, PrefixTuningConfig(**settings, encoder_hidden_size=width))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.PrefixTuningConfig(**settings, encoder_hidden_size=width))
    return theirs.get_nb_trainable_parameters()[0], ours.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("projection", [False, True])
def test_what_it_saves_loads_here_and_in_peft_with_the_same_answers(
    projection: bool, base: PreTrainedModel, batch: Batch, tmp_path: Path
) -> None:
    model = perturbed(base, prefix_projection=projection)
    answers = logits(model, batch)
    text = model.generate(input_ids=batch["input_ids"][:1], max_new_tokens=8, do_sample=False)
    model.save_pretrained(tmp_path / "out")
    for loaded in (
        PeftModel.from_pretrained(base, tmp_path / "out"),
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out"),
    ):
        torch.testing.assert_close(logits(loaded, batch), answers, rtol=0, atol=1e-10)
        again = loaded.generate(input_ids=batch["input_ids"][:1], max_new_tokens=8, do_sample=False)
        assert torch.equal(again, text)
    with attach(base, Prefix.load(tmp_path / "out")):
        torch.testing.assert_close(logits(base, batch), answers, rtol=0, atol=1e-10)
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert (config.num_virtual_tokens, config.base_model_name_or_path) == (P, "LlamaForCausalLM")


def test_what_peft_saved_loads_with_the_same_answers_and_trains_on(
    base: PreTrainedModel, batch: Batch, tmp_path: Path
) -> None:
    theirs, _ = both(base, prefix_projection=True)
    train(theirs, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert not loaded.training
    torch.testing.assert_close(logits(loaded, batch), logits(theirs, batch), rtol=0, atol=1e-10)
    assert loaded.get_nb_trainable_parameters()[0] == 0
    more = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(more, batch), logits(theirs, batch), rtol=0, atol=1e-10)
    losses = train(more, batch)
    assert losses[-1] < losses[0]


def test_the_base_model_called_by_itself_is_the_base_model(base: PreTrainedModel, batch: Batch) -> None:
    plain = logits(base, batch)
    model = perturbed(base)
    with_prefix = logits(model, batch)
    assert (with_prefix - plain).abs().max() > 0.1
    assert torch.equal(logits(base, batch), plain)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), plain)
    with pytest.raises(InjectionError, match="prefix and text need"):
        model(input_ids=torch.ones(1, 128, dtype=torch.long))
    assert torch.equal(logits(base, batch), plain)
    assert torch.equal(logits(model, batch), with_prefix)
    assert model.unload() is base
    assert model.get_base_model() is base


def test_two_prefixes_share_a_base_model(base: PreTrainedModel, batch: Batch) -> None:
    first, second = perturbed(base), perturbed(base, prefix_projection=True)
    alone = logits(first, batch)
    assert not torch.equal(logits(second, batch), alone)
    assert torch.equal(logits(first, batch), alone)


def test_gradient_checkpointing_changes_no_gradient(base: PreTrainedModel, batch: Batch) -> None:
    model = perturbed(base, prefix_projection=True).train()
    parameters = list(model.encoder.parameters())
    expected = torch.autograd.grad(model(**batch).loss, parameters)
    model.gradient_checkpointing_enable()
    found = torch.autograd.grad(model(**batch).loss, parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert any(gradient.abs().max() > 1e-3 for gradient in found)
    model.eval()
    answers = logits(model, batch)
    model.base_model.activation_checkpointing_disable()
    assert torch.equal(logits(model, batch), answers)


def kl_to_the_base(model: PeftModel, base: PreTrainedModel, batch: Batch) -> Tensor:
    ids = batch["input_ids"]
    ours = model(input_ids=ids).logits.log_softmax(-1)
    with torch.no_grad():
        plain = base(input_ids=ids).logits.log_softmax(-1)
    return nn.functional.kl_div(ours, plain, log_target=True, reduction="sum")


def test_under_gradient_checkpointing_the_base_model_stays_plain_too(base: PreTrainedModel, batch: Batch) -> None:
    """A penalty for leaving the base model behind would otherwise compare the prefix with itself."""
    ids = batch["input_ids"]
    plain = base(input_ids=ids).logits
    model = perturbed(base).train()
    parameters = list(model.encoder.parameters())
    expected = kl_to_the_base(model, base, batch)
    gradients = torch.autograd.grad(expected, parameters)
    model.gradient_checkpointing_enable()
    found = kl_to_the_base(model, base, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert found > 1e-3
    for ours, theirs in zip(torch.autograd.grad(found, parameters), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    torch.testing.assert_close(base(input_ids=ids).logits, plain, rtol=0, atol=1e-10)


def test_what_comes_between_a_forward_and_its_backward_pass_does_no_harm(base: PreTrainedModel, batch: Batch) -> None:
    model = perturbed(base).train()
    parameters = list(model.encoder.parameters())
    expected = torch.autograd.grad(model(**batch).loss, parameters)
    model.gradient_checkpointing_enable()
    loss = model(**batch).loss
    written = model.eval().generate(batch["input_ids"], max_new_tokens=3, do_sample=False)
    with model.train().disable_adapter():
        model(**batch)
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    base.activation_checkpointing_disable()
    assert torch.equal(model.eval().generate(batch["input_ids"], max_new_tokens=3, do_sample=False), written)


def test_a_model_that_is_gone_leaves_the_base_model_free(base: PreTrainedModel, batch: Batch) -> None:
    model = perturbed(base).train()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    del model
    gc.collect()
    base.activation_checkpointing_disable()
    assert base.config._attn_implementation == "sdpa"
    perturbed(base).train()(**batch).loss.backward()


def test_it_starts_from_the_text_it_is_given(base: PreTrainedModel) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    text = [9, 20, 33]
    model = get_peft_model(base, config, init_token_ids=text)
    expected = text_states(base, torch.tensor([9, 20, 33, 9, 20]))
    for ours, theirs in zip(model.prefix.states.sites, expected.sites, strict=True):
        torch.testing.assert_close(ours.key.double(), theirs.key, rtol=0, atol=1e-6)  # float32
    with pytest.raises(ConfigError, match=r"^init_token_ids: this model has tokens 0 to \d+, got 100000$"):
        get_peft_model(base, config, init_token_ids=[1, 100000])
    with pytest.raises(ConfigError, match="init_token_ids: holds no tokens; give at least one, or leave it out"):
        get_peft_model(base, config, init_token_ids=[])
    zero = PrefixTuningConfig(task_type="CAUSAL_LM", init_weights="zero")
    with pytest.raises(ConfigError, match="init_token_ids: contradicts init_weights='zero'; leave one of them out"):
        get_peft_model(base, zero, init_token_ids=text)


@pytest.mark.parametrize("projection", [False, True])
def test_its_random_start_has_pefts_spread(projection: bool, base: PreTrainedModel) -> None:
    settings: dict[str, Any] = {
        "task_type": "CAUSAL_LM", "num_virtual_tokens": 100, "prefix_projection": projection,
        "encoder_hidden_size": 128 if projection else None,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(9)
        ours = get_peft_model(base, PrefixTuningConfig(**settings, init_weights="random"))
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.PrefixTuningConfig(**settings))
    spread = theirs.get_prompt_embedding_to_save("default").std()
    assert spread == pytest.approx(0.3 if projection else 1.0, rel=0.1)
    # The seed is fixed; the MLP's 6,400 numbers come from 128 features, so their spread varies by some per cent.
    assert ours.prefix.states.to_rows().std() == pytest.approx(spread.item(), rel=0.1)


def test_zero_starts_at_zero_and_seeds_follow_torchs(base: PreTrainedModel) -> None:
    def rows(seed: int, **settings: Any) -> Tensor:
        torch.manual_seed(seed)
        return get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", **settings)).prefix.states.to_rows()

    with torch.random.fork_rng():
        for projection in (False, True):
            assert not rows(0, init_weights="zero", prefix_projection=projection).any()
            assert torch.equal(rows(0, prefix_projection=projection), rows(0, prefix_projection=projection))
            assert not torch.equal(rows(0, prefix_projection=projection), rows(1, prefix_projection=projection))


def test_a_windowed_model_is_saved_as_an_artefact_only_and_says_so(
    make_tiny_llama: Any, batch: Batch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    settings = make_tiny_llama().config.to_dict()
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    base = MistralForCausalLM(MistralConfig(**{k: settings[k] for k in keep}, num_key_value_heads=2, sliding_window=4))
    model = perturbed(base.double())
    perturbed(make_tiny_llama().double()).save_pretrained(tmp_path)  # whose files PEFT would load
    assert list(tmp_path.glob("adapter_*"))
    with caplog.at_level(logging.WARNING, "prefixkit"):
        logging.getLogger("prefixkit").addHandler(caplog.handler)
        model.save_pretrained(tmp_path)
        logging.getLogger("prefixkit").removeHandler(caplog.handler)
    assert "saved as a prefixkit artefact only: MistralForCausalLM has a sliding window of 4 tokens" in caplog.text
    assert not list(tmp_path.glob("adapter_*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prefix.json", "prefix.safetensors"]
    loaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), rtol=0, atol=1e-10)
    assert PeftConfig.from_pretrained(tmp_path).num_virtual_tokens == P


def test_loading_refuses_what_it_cannot_trust(base: PreTrainedModel, make_tiny_llama: Any, tmp_path: Path) -> None:
    perturbed(base).save_pretrained(tmp_path / "out")
    with pytest.raises(BaseMismatchError, match="this artefact was trained on LlamaForCausalLM"):
        PeftModel.from_pretrained(make_tiny_llama(seed=1), tmp_path / "out")
    path = tmp_path / "out" / "adapter_model.safetensors"
    save_file({"prompt_embeddings": load_file(path)["prompt_embeddings"] + 1}, path)
    with pytest.raises(
        ArtefactError, match="prefix.safetensors and adapter_model.safetensors differ; remove the files of"
    ):
        PeftModel.from_pretrained(base, tmp_path / "out")
    states = perturbed(base).prefix.states
    gated = PrefixStates(states.geometry, tuple(replace(site, gate=torch.ones(4)) for site in states.sites))
    Prefix.from_states(gated, base=BaseCard(id="tiny")).save(tmp_path / "out")
    with pytest.raises(ArtefactError, match="prefix.safetensors and adapter_model.safetensors differ"):
        PeftModel.from_pretrained(base, tmp_path / "out")
    sick = {f"states.{layer}": torch.full((2, 2, P, 8), float("nan")) for layer in range(2)}
    wrong = ({"table": torch.zeros(2, 3)}, {"lm_head.weight": torch.zeros(2)}, {"states.0": torch.zeros(2)}, sick)
    for content in wrong:
        save_file(content, tmp_path / "model.safetensors")
        with pytest.raises(
            ArtefactError, match="model.safetensors: holds no prefix for this model; expected what Trainer"
        ):
            PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(ArtefactError, match="no such folder"):
        PeftModel.from_pretrained(base, tmp_path / "nowhere")


def test_what_it_does_not_do_is_said(base: PreTrainedModel) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    model = get_peft_model(base, config)
    assert model.config is base.config
    for name in ("push_to_hub", "merge_and_unload", "add_adapter", "prompt_encoder", "get_prompt", "modules_to_save"):
        with pytest.raises(AttributeError, match=f"prefixkit's PeftModel has no {name}: "):
            getattr(model, name)
    model.set_adapter("default")
    assert model.active_adapters == [model.active_adapter] == ["default"]
    assert (model.active_peft_config, model.peft_type) == (config, "PREFIX_TUNING")
    with pytest.raises(
        ConfigError, match="adapter_name: expected \"default\", got 'b'; one model holds one prefix here"
    ):
        model.set_adapter("b")
    model.set_input_embeddings(model.get_input_embeddings())
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing
    with pytest.raises(ConfigError, match="safe_serialization=False: would write a pickle; leave it out"):
        model.save_pretrained("nowhere", safe_serialization=False)
    with pytest.raises(
        ConfigError, match="adapter_name: expected \"default\", got 'b'; one model holds one prefix here"
    ):
        get_peft_model(base, config, "b")
    with pytest.raises(ConfigError, match="adapter_name: expected \"default\", got 'b'"):
        PeftModel.from_pretrained(base, "nowhere", "b")
    with pytest.raises(
        ConfigError, match="expected prefixkit's PrefixTuningConfig, got peft's PrefixTuningConfig; import"
    ):
        get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_which_reads_no_prefix_is_refused(name: str, base: PreTrainedModel) -> None:
    model = perturbed(base)
    assert hasattr(base, name)
    with pytest.raises(AttributeError, match=f"PeftModel has no {name}: continuous batching reads no prefix; call gen"):
        getattr(model, name)


def test_no_method_or_part_of_the_base_runs_it_without_the_prefix(base: PreTrainedModel, batch: Batch) -> None:
    """Also those that transformers, or a model from elsewhere, adds tomorrow."""

    def score(self: Any, ids: Tensor) -> Tensor:
        found: Tensor = self(input_ids=ids).logits
        return found

    type(base).score = score
    try:
        model = perturbed(base)
        for name in ("score", "model", "get_decoder", "prepare_inputs_for_generation", "_sample", "_prefill"):
            with pytest.raises(AttributeError, match=f"has no {name}: called on the base model it could leave the pre"):
                getattr(model, name)
        expected = model(input_ids=batch["input_ids"]).logits
        with attach(base, model.prefix):
            torch.testing.assert_close(base.score(batch["input_ids"]), expected, rtol=0, atol=1e-10)
    finally:
        del type(base).score


def test_what_runs_nothing_is_the_base_models(base: PreTrainedModel) -> None:
    model = perturbed(base)
    assert (model.device, model.dtype, model.main_input_name) == (base.device, base.dtype, "input_ids")
    assert model.lm_head is base.lm_head
    assert model.get_input_embeddings() is base.get_input_embeddings()
    assert model.num_parameters() == base.num_parameters()
    assert model.config_class is type(base.config)
    assert model.can_generate()


def test_a_trained_prefix_takes_no_state_and_a_model_with_lora_no_second_method(
    base: PreTrainedModel, tmp_path: Path
) -> None:
    perturbed(base).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert loaded.state_dict() == {}
    with pytest.raises(ConfigError, match="this prefix is not in training; load it with from_pretrained"):
        loaded.load_state_dict({})
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        UnsupportedModelError, match="LlamaForCausalLM: holds adapters, which save_pretrained here would"
    ):
        get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM"))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_prefix_that_learned_labels_does_not_lose_its_head(
    is_trainable: bool, make_model: Any, make_prefix: Any, tmp_path: Path
) -> None:
    model = make_model("llama")
    prefix, width = make_prefix(model, P), model.config.hidden_size
    head = Head(HeadKind.SEQUENCE, ("a", "b"), torch.zeros(2, width), torch.zeros(2))
    Prefix.from_states(prefix.states, base=prefix.card.base, head=head).save(tmp_path / "labels")
    with pytest.raises(ArtefactError, match="its prefix learned labels and has a head, which would be lost here; use"):
        PeftModel.from_pretrained(model, tmp_path / "labels", is_trainable=is_trainable)


def test_gradient_checkpointing_disabled_lets_go_of_the_base_model(base: PreTrainedModel, batch: Batch) -> None:
    model = perturbed(base).train()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    with pytest.raises(InjectionError, match="a prefix is attached to this model already"):
        attach(base, None)
    model.gradient_checkpointing_disable()
    assert not base.is_activation_checkpointing
    attach(base, None).detach()
    copy.deepcopy(model)(**batch).loss.backward()


def test_pefts_remaining_arguments_for_loading_and_saving(base: PreTrainedModel, tmp_path: Path) -> None:
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model.save_pretrained(tmp_path / "not mine", is_main_process=False)
    assert not (tmp_path / "not mine").exists()
    model.save_pretrained(tmp_path, True, ["default"], save_embedding_layers="auto")
    own = PrefixTuningConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, "default", True, own, low_cpu_mem_usage=True)
    assert loaded.encoder is not None
    with pytest.raises(ConfigError, match="selected_adapters=.*'b'.*: one model holds one prefix here"):
        model.save_pretrained(tmp_path, selected_adapters=["b"])
    with pytest.raises(ConfigError, match="save_pretrained: save_embedding_layers=True: the base model is frozen"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ConfigError, match="PeftModel.from_pretrained: torch_device='cuda': a prefix is where the"):
        PeftModel.from_pretrained(base, tmp_path, torch_device="cuda")
    with pytest.raises(ConfigError, match='from_pretrained: key_maping: unknown; did you mean "key_mapping"'):
        PeftModel.from_pretrained(base, tmp_path, key_maping=None)
    other = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    with pytest.raises(ConfigError, match="config: num_virtual_tokens is 5, that of the saved prefix 4; leave it out"):
        PeftModel.from_pretrained(base, tmp_path, config=other)


def test_a_configuration_of_something_else_is_refused(base: PreTrainedModel, tmp_path: Path) -> None:
    get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="config: expected prefixkit's PrefixTuningConfig, got peft's LoraConfig"):
        PeftModel.from_pretrained(base, tmp_path, config=peft.LoraConfig())
    named = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, base_model_name_or_path="another/model")
    with pytest.raises(ConfigError, match="config: base_model_name_or_path is another/model, that of the saved prefix"):
        PeftModel.from_pretrained(base, tmp_path, config=named)
    other = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, placement=["cross"])
    with pytest.raises(ConfigError, match="config: task_type is SEQ_2_SEQ_LM, that of the saved prefix CAUSAL_LM"):
        PeftModel.from_pretrained(base, tmp_path, config=other)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (peft.get_peft_model, get_peft_model),
        (peft.PeftModel.from_pretrained, PeftModel.from_pretrained),
        (peft.PeftModel.save_pretrained, PeftModel.save_pretrained),
    ],
)
def test_arguments_are_those_of_peft_in_its_order(theirs: Any, ours: Any) -> None:
    """All of PEFT's are taken by name, and what may stand in place stands in PEFT's place."""
    own, known = list(inspect.signature(ours).parameters.values()), inspect.signature(theirs).parameters
    in_place = [each.name for each in own if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert in_place == list(known)[: len(in_place)]
    tables = {*LOADING, *SAVING, *MAKING}
    assert {*known} - {"kwargs"} <= {*in_place} | tables
