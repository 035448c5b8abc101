"""One training run: from a base model and examples to the best encoder, resumable at every step."""

import copy
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PrinterCallback, TrainingArguments

from prefixkit import processes
from prefixkit.compat import refusal_of_tracker
from prefixkit.config import OnDivergence, Recipe, TrainConfig
from prefixkit.data import Collator, DistributedBatchSampler, Example, LengthGroupedSampler
from prefixkit.data.stream import StreamedExamples, StreamSampler, TrainingStream
from prefixkit.errors import ConfigError, DivergedError
from prefixkit.logs import get_logger
from prefixkit.methods import rate_of
from prefixkit.models import Base
from prefixkit.models.weights import input_device
from prefixkit.seeding import derive
from prefixkit.training.callbacks import (
    METRICS_NAME,
    HeldOut,
    Measure,
    Metrics,
    ProgressBar,
    StopAfterStep,
    read_metrics,
)
from prefixkit.training.checkpoint import Progress, checkpoint_folder, checkpoints, newest_readable, read_own, step_of
from prefixkit.training.model import Part, PrefixModel, Trained
from prefixkit.training.monitor import Monitor
from prefixkit.training.start import build_model
from prefixkit.training.trainer import PrefixTrainer

log = get_logger(__name__)

#: Under a run folder: where the windows of a stream began.
STREAM_NAME = "training/stream.json"
#: Through which `accelerate launch` says in which precision to compute.
_PRECISION = "ACCELERATE_MIXED_PRECISION"


@dataclass(frozen=True)
class Outcome:
    """What training gave.

    Attributes:
        trained: what was trained, at its best held-out loss.
        state: the same as parameters by name, to keep training from.
        trained_parameters: numbers that were trained, the head's included.
        steps: optimiser steps taken.
        best_step: the step of the best held-out loss.
        best_loss: that loss, nats per token, or per label.
        tokens: text tokens read, padding not counted.
        seconds: time in the training loop, held-out losses included.
        rollbacks: times the learning rate was halved after divergence.
    """

    trained: Trained
    state: dict[str, Tensor]
    trained_parameters: int
    steps: int
    best_step: int
    best_loss: float
    tokens: int
    seconds: float
    rollbacks: int


def train_prefix(
    base: Base,
    examples: Sequence[Example],
    recipe: Recipe,
    folder: Path,
    *,
    stream: TrainingStream | None = None,
    classes: Sequence[str] = (),
    measure: Measure,
    report: ProgressBar,
) -> Outcome:
    """Train a prefix, or what a recipe's method is; goes on from the newest checkpoint in the folder if there is one.

    Args:
        base: the frozen base model, with nothing attached.
        examples: what to learn from.
        recipe: how.
        stream: what to learn from instead; `examples` are then its first ones.
        folder: the run folder; checkpoints go to ``training/checkpoints/``, metrics to ``metrics.jsonl``.
        classes: names of the labels to tell apart, where labels are learned.
        measure: held-out loss of what is trained, for early stopping.
        report: told about progress.

    Raises:
        DivergedError: loss or gradients left the rails and rolling back did not help.
        TrainingError: a checkpoint could not be saved.
        KeyboardInterrupt: Ctrl-C; a checkpoint was saved first.
    """
    with _own_surroundings():  # torch's layers draw their weights as they are made, before ours replace them
        model = build_model(base, examples, recipe, classes)
    learned: Sequence[Example] | StreamedExamples = examples
    if stream is not None:
        learned = StreamedExamples(stream, recipe.train, folder / STREAM_NAME, writes=processes.is_first())
    at_start = copy.deepcopy(model.trained_state())
    progress, tried = Progress(), set[Path]()
    try:
        with _own_surroundings():
            while True:
                try:
                    return _run_once(model, base, learned, recipe, folder, measure, report, progress)
                except DivergedError as error:
                    progress = _roll_back(error, progress, recipe.train, folder, tried)
                    model.load_trained_state(at_start)  # a checkpoint, if there is one, overwrites this
    finally:
        model.close()
        if isinstance(learned, StreamedExamples):
            learned.close()


def _run_once(
    model: PrefixModel,
    base: Base,
    examples: Sequence[Example] | StreamedExamples,
    recipe: Recipe,
    folder: Path,
    measure: Measure,
    report: ProgressBar,
    progress: Progress,
) -> Outcome:
    """Run the trainer to the end, to an interruption, or to a divergence."""
    config = recipe.train

    def measure_aside(trained: Trained) -> float:
        with model.set_aside():
            return measure(trained)

    newest = newest_readable(checkpoint_folder(folder))
    if newest is not None:
        _, best, saved = read_own(newest)
        progress.rollbacks = max(progress.rollbacks, saved.rollbacks)  # before the rate is chosen
        if best is not None and _is_over(step_of(newest), saved, config):
            return _outcome(model, best, saved, step_of(newest), folder)
    rates = {part: rate * 0.5**progress.rollbacks for part, rate in peak_rates(model, recipe).items()}
    heldout = HeldOut(model, measure_aside, every=config.evaluate_every, patience=config.patience, progress=progress)
    metrics = Metrics(folder / METRICS_NAME, heldout, report)
    stop = StopAfterStep()
    trainer = PrefixTrainer(
        model,
        batch_sampler=_batch_sampler(examples, config),
        heldout=heldout,
        metrics=metrics,
        monitor=Monitor(config.divergence.loss_ratio, config.divergence.norm_ratio, config.max_grad_norm),
        stop=stop,
        rates=rates,
        args=_arguments(
            config, checkpoint_folder(folder), next(iter(rates.values())), base, may_miss=model.delta is not None
        ),
        train_dataset=_with_idle(examples),
        data_collator=Collator(base.tokenizer.pad_token_id),
        callbacks=[heldout, metrics, stop],
    )
    trainer.remove_callback(PrinterCallback)  # stdout is data
    with stop.listening():
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    if stop.is_due and not _is_over(trainer.state.global_step, progress, config):
        raise KeyboardInterrupt
    assert heldout.best is not None
    return _outcome(model, heldout.best, progress, trainer.state.global_step, folder)


def peak_rates(model: PrefixModel, recipe: Recipe) -> dict[Part, float]:
    """Return the peak rate of each part that is trained."""
    of = {Part.PREFIX: lambda: recipe.train.learning_rate, Part.METHOD: lambda: rate_of(recipe.method),
          Part.HEAD: lambda: recipe.head.learning_rate}  # fmt: skip
    return {part: of[part]() for part in model.parts()}


def _is_over(step: int, progress: Progress, config: TrainConfig) -> bool:
    """Whether a run has nothing left to do: transformers' Trainer would take one more step."""
    return step >= config.steps or (config.patience is not None and progress.waited >= config.patience)


def _outcome(model: PrefixModel, best: dict[str, Tensor], progress: Progress, steps: int, folder: Path) -> Outcome:
    assert progress.best_loss is not None
    if progress.best_step == 0 and processes.is_first():
        log.warning(
            "no held-out loss came below the one before the first step, %.3f: what is kept is the start, nothing was "
            "learned; lower the learning rate, or train for more steps",
            progress.best_loss,
        )
    model.load_trained_state(best)
    last = read_metrics(folder / METRICS_NAME)[-1]
    return Outcome(
        trained=model.materialise(),
        state={name: tensor.detach().clone() for name, tensor in model.trained_state().items()},
        trained_parameters=sum(number.numel() for own in model.parts().values() for number in own),
        steps=steps,
        best_step=progress.best_step,
        best_loss=progress.best_loss,
        tokens=last["tokens"],
        seconds=last["seconds"],
        rollbacks=progress.rollbacks,
    )


def _roll_back(
    error: DivergedError, progress: Progress, config: TrainConfig, folder: Path, tried: set[Path]
) -> Progress:
    """Decide what follows a divergence; returns the memory to go on with, or raises.

    A checkpoint that was gone back to once may have been saved after the step that did the damage, which shows only
    later: the next time the one before it is taken.
    """
    rollbacks = progress.rollbacks + 1
    if config.divergence.action is OnDivergence.STOP:
        raise error
    if rollbacks > config.divergence.max_rollbacks:
        raise DivergedError(f"{error} (gave up after {progress.rollbacks} rollbacks)") from None
    found = checkpoints(checkpoint_folder(folder))
    if found and found[-1] in tried:
        spoilt = found.pop()
        if processes.is_first():
            shutil.rmtree(spoilt)
    processes.wait()
    tried.clear()
    tried.update(found[-1:])
    log.warning("%s; going back to %s with half the learning rate", error, found[-1].name if found else "the start")
    return Progress(rollbacks=rollbacks)


def _with_idle(examples: Sequence[Example] | StreamedExamples) -> Any:
    """Return what the batch sampler's numbers are looked up in."""
    return examples if isinstance(examples, StreamedExamples) else [*examples, examples[0].without_loss()]


def _batch_sampler(
    examples: Sequence[Example] | StreamedExamples, config: TrainConfig
) -> DistributedBatchSampler | StreamSampler:
    mine = {"rank": processes.rank(), "num_replicas": processes.count()}
    if isinstance(examples, StreamedExamples):
        return StreamSampler(config.steps * config.accumulation, config.batch_size, **mine)
    sampler = LengthGroupedSampler(
        [example.num_tokens for example in examples],
        batch_size=config.batch_size,
        seed=config.seed,
        group_by_length=config.group_by_length,
    )
    return DistributedBatchSampler(sampler, **mine)


def _arguments(config: TrainConfig, folder: Path, rate: float, base: Base, *, may_miss: bool) -> TrainingArguments:
    """Translate a recipe into transformers' settings; some of what is trained may have no part in a loss."""
    on_cpu = input_device(base.model).type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=rate,
        lr_scheduler_type=str(config.schedule) if config.schedule != "constant" else "constant_with_warmup",
        warmup_steps=round(config.warmup * config.steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        seed=derive(config.seed, "trainer") % 2**32,
        bf16=config.autocast,
        activation_checkpointing=config.gradient_checkpointing,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and processes.count() > 1 else None,
        ddp_find_unused_parameters=may_miss,
        save_strategy="steps",
        save_steps=config.checkpoint_every,
        save_total_limit=config.keep_checkpoints,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        report_to=config.report_to or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several it would make replicas, which read no prefix
    return arguments


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that transformers does not know or that are not installed.

    Raises:
        ConfigError: one is not usable.
    """
    for name in names:
        refusal = None if name in ("none", "all") else refusal_of_tracker(name)
        if refusal is not None:
            raise ConfigError(f"train.report_to: {refusal}")


@contextmanager
def _own_surroundings() -> Iterator[None]:
    """The trainer seeds the global generators; give the caller's back afterwards, and what a launcher set."""
    python, numpy, launched = random.getstate(), np.random.get_state(), os.environ.get(_PRECISION)
    os.environ[_PRECISION] = "no"  # the recipe decides, through bf16
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            os.environ.pop(_PRECISION)
            if launched is not None:
                os.environ[_PRECISION] = launched
