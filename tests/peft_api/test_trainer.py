"""transformers' Trainer takes the model as it takes PEFT's: the same losses, small checkpoints, exact resume."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from prefixkit import PeftModel, PrefixTuningConfig, get_peft_model
from prefixkit.models.fingerprint import fingerprint

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
        assert set(file.keys()) == {"table", "hidden.0.weight", "hidden.0.bias", "last.weight", "last.bias"}


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
