"""transformers' Trainer takes the model as it takes PEFT's: the same losses, small checkpoints, exact resume."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from prefixkit import PeftModel, Prefix, PrefixStates, PrefixTuningConfig, get_peft_model
from prefixkit.errors import ArtefactError, BaseMismatchError
from prefixkit.models.fingerprint import fingerprint
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import BaseCard, SiteStates, reproduce

SETTINGS: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}


def fit(
    model: nn.Module, batch: dict[str, Tensor], folder: Path, *, resume: bool = False, **options: Any
) -> list[float]:
    """Train for four steps of two accumulated batches; returns the logged losses."""
    arguments = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
        "learning_rate": 0.02, "logging_steps": 1, "save_steps": 2, "report_to": [], "seed": 1, "use_cpu": True,
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    rows = [{key: value[i] for key, value in batch.items()} for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(model=model, args=TrainingArguments(**(arguments | options)), train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_the_trainer_logs_the_losses_it_logs_for_peft(
    base: PreTrainedModel, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.PrefixTuningConfig(**SETTINGS, init_weights="zero"))
    ours = get_peft_model(base, PrefixTuningConfig(**SETTINGS, init_weights="zero"))
    table = theirs.prompt_encoder["default"].embedding.weight
    rows = 0.3 * torch.randn(table.shape, generator=torch.Generator().manual_seed(0))  # no two virtual tokens alike
    table.data.copy_(rows)
    reproduce(ours.encoder, PrefixStates.from_rows(ours.encoder.geometry, rows))
    expected, found = fit(theirs, batch, tmp_path / "theirs"), fit(ours, batch, tmp_path / "ours")
    assert len(found) == 4
    assert found == pytest.approx(expected, abs=1e-4)  # the Trainer rounds what it logs
    assert len({round(loss, 2) for loss in found}) > 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_projected_run_that_was_stopped_resumes_exactly(
    checkpointing: bool, base: PreTrainedModel, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    def fresh(seed: int) -> Any:
        torch.manual_seed(seed)
        return get_peft_model(copy.deepcopy(base), PrefixTuningConfig(**SETTINGS, prefix_projection=True))

    with torch.random.fork_rng():
        whole, begun, resumed = fresh(0), fresh(0), fresh(1)
    options = {"activation_checkpointing": checkpointing, "lr_scheduler_type": "constant"}
    fit(whole, batch, tmp_path / "whole", **options)
    fit(begun, batch, tmp_path / "cut", max_steps=2, **options)
    fit(resumed, batch, tmp_path / "cut", resume=True, **options)
    assert torch.equal(resumed.prefix.states.to_rows(), whole.prefix.states.to_rows())
    assert not torch.equal(begun.prefix.states.to_rows(), whole.prefix.states.to_rows())
    with safe_open(tmp_path / "cut" / "checkpoint-2" / "model.safetensors", "pt") as file:
        state = {"table", "units", "hidden.0.weight", "hidden.0.bias", "last.weight", "last.bias"}
        assert set(file.keys()) == state | {"position_offset", "base_fingerprint"}


@pytest.mark.parametrize("projection", [False, True])
def test_what_the_trainer_saved_can_be_loaded(
    projection: bool, base: PreTrainedModel, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    model = get_peft_model(base, PrefixTuningConfig(**SETTINGS, prefix_projection=projection))
    fit(model, batch, tmp_path)
    for folder in ("checkpoint-4", "saved"):
        if folder == "saved":
            Trainer(model=model, args=TrainingArguments(str(tmp_path), use_cpu=True)).save_model(str(tmp_path / folder))
        loaded = PeftModel.from_pretrained(base, tmp_path / folder).prefix
        assert torch.equal(loaded.states.to_rows(), model.prefix.states.to_rows())
        assert loaded.card.base.fingerprint == fingerprint(base)
        assert loaded.position_offset == 5


@pytest.mark.parametrize(("lengths", "gated", "offset"), [((4, 4), False, 0), ((0, 3), False, 7), ((2, 1), True, 0)])
def test_what_only_prefixkit_can_say_survives_the_trainer(
    lengths: tuple[int, int], gated: bool, offset: int, base: PreTrainedModel, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    geometry = inspect_model(base).geometry
    dice = torch.Generator().manual_seed(3)
    sites = tuple(
        SiteStates(
            torch.randn(site.kv_heads, p, site.head_dim, generator=dice),
            torch.randn(site.kv_heads, p, site.head_dim, generator=dice),
            torch.rand(site.query_heads, generator=dice) if gated and p else None,
        )
        for site, p in zip(geometry.sites, lengths, strict=True)
    )
    card = BaseCard(id="tiny", fingerprint=fingerprint(base))
    Prefix.from_states(PrefixStates(geometry, sites), base=card, position_offset=offset).save(tmp_path / "made")
    model = PeftModel.from_pretrained(base, tmp_path / "made", is_trainable=True)
    fit(model, batch, tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path / "checkpoint-4").prefix
    assert (loaded.states.lengths, loaded.states.has_gate, loaded.position_offset) == (lengths, gated, offset)
    assert loaded.states.equals(model.prefix.states)


def test_a_folder_that_also_holds_other_weights_of_a_trainer_is_refused(
    base: PreTrainedModel, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    def save(model: nn.Module) -> None:
        Trainer(model=model, args=TrainingArguments(str(tmp_path), use_cpu=True)).save_model(str(tmp_path / "out"))

    model = get_peft_model(base, PrefixTuningConfig(**SETTINGS))
    model.save_pretrained(tmp_path / "out")
    save(model)
    assert PeftModel.from_pretrained(base, tmp_path / "out").prefix.states.equals(model.prefix.states)
    fit(model, batch, tmp_path / "run")
    save(model)
    with pytest.raises(ArtefactError, match="prefix.safetensors and model.safetensors differ; remove the files of"):
        PeftModel.from_pretrained(base, tmp_path / "out")


def test_a_quantised_base_trains(base: PreTrainedModel, batch: dict[str, Tensor], tmp_path: Path) -> None:
    """transformers' Trainer refuses quantised models unless something else than their weights is trained."""

    class Quantiser:
        is_trainable, is_qat_trainable = True, False

    config = PrefixTuningConfig(**SETTINGS, init_weights="zero")
    expected = fit(get_peft_model(copy.deepcopy(base), config), batch, tmp_path / "plain")
    base.is_quantized, base.hf_quantizer, base.quantization_method = True, Quantiser(), "none"
    assert fit(get_peft_model(base, config), batch, tmp_path / "quantised") == expected


def test_a_trainers_checkpoint_goes_onto_no_other_base_model(
    base: PreTrainedModel, make_tiny_llama: Callable[..., PreTrainedModel], batch: dict[str, Tensor], tmp_path: Path
) -> None:
    fit(get_peft_model(base, PrefixTuningConfig(**SETTINGS)), batch, tmp_path)
    other = make_tiny_llama()
    with torch.no_grad():
        other.lm_head.weight.add_(0.1)
    with pytest.raises(BaseMismatchError, match="this artefact was trained on another base model"):
        PeftModel.from_pretrained(other, tmp_path / "checkpoint-4")
    with pytest.raises(BaseMismatchError, match="this artefact was trained on another base model"):
        get_peft_model(other, PrefixTuningConfig(**SETTINGS)).load_state_dict(
            load_file(tmp_path / "checkpoint-4" / "model.safetensors")
        )


def test_a_trainers_checkpoint_names_no_base_model(
    base: PreTrainedModel, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    fit(get_peft_model(base, PrefixTuningConfig(**SETTINGS)), batch, tmp_path)
    with pytest.raises(ArtefactError, match="a Trainer's checkpoint does not name its base model; load it with Peft"):
        PrefixTuningConfig.from_pretrained(tmp_path / "checkpoint-4")
