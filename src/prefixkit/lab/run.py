"""One run, end to end: train, measure, save, report. Every step can be interrupted and resumed."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from prefixkit.config import Recipe
from prefixkit.data import PreparedData, prepare
from prefixkit.errors import ArtefactError, TrainingError
from prefixkit.evaluation import Evaluation, evaluate, heldout_loss
from prefixkit.files import atomic_path, read_json, write_json, write_text
from prefixkit.lab.folder import RUN, SAMPLES, SCORES, open_run, read_recipe
from prefixkit.lab.report import write_report
from prefixkit.logs import get_logger
from prefixkit.models import Base, load_base_model
from prefixkit.models.fingerprint import fingerprint, weights_hash
from prefixkit.models.hardware import choose_threads, describe_machine, peak_memory_bytes
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import BaseCard, Prefix, PrefixStates, TrainingCard
from prefixkit.training import Outcome, train_prefix

log = get_logger(__name__)

#: Told what is going on: what, how much is done, of how much, and a few words.
Report = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where it is.
        prefix: the artefact.
        scores: flat keys, as in scores.json, without the intervals.
        report: the page for people.
    """

    folder: Path
    prefix: Prefix
    scores: dict[str, float]
    report: Path


def train_run(recipe: Recipe, folder: Path, *, resume: bool = False, overwrite: bool = False, report: Report) -> Run:
    """Run a recipe.

    Args:
        recipe: what to run.
        folder: the run folder.
        resume: go on with what is there; a finished run is returned as it is.
        overwrite: throw away what is there.
        report: told about progress.

    Raises:
        PrefixkitError: with one line that says what is wrong; what was saved before stays.
        KeyboardInterrupt: Ctrl-C; go on with `resume`.
    """
    open_run(folder, recipe, resume=resume, overwrite=overwrite)
    if is_finished(folder):
        log.info("%s is finished already", folder)
        return _finished(folder)
    torch.set_num_threads(choose_threads(recipe.train.threads))
    base, data = _load(recipe)
    if not (folder / RUN).is_file() or "content_hash" not in read_json(folder / RUN):
        _train(recipe, folder, base, data, report)
    _measure(recipe, folder, base, data, report)
    return _finished(folder)


def evaluate_run(folder: Path, recipe: Recipe, *, report: Report) -> Run:
    """Measure a trained run again, with the evaluation settings of `recipe`.

    Raises:
        ArtefactError: the run is not trained to its end.
    """
    Prefix.load(folder)
    torch.set_num_threads(choose_threads(recipe.train.threads))
    base, data = _load(recipe)
    _measure(recipe, folder, base, data, report)
    return _finished(folder)


def is_finished(folder: Path) -> bool:
    """Whether a run has been trained and measured."""
    return (folder / SCORES).is_file()


def load_run_base(folder: Path) -> tuple[Base, Prefix, Recipe]:
    """Load what is needed to generate with a run.

    Raises:
        ArtefactError: the folder is no trained run, or the base model it names is another by now.
    """
    recipe = read_recipe(folder)
    prefix = Prefix.load(folder)
    torch.set_num_threads(choose_threads(recipe.train.threads))
    return load_base_model(recipe.model.base, revision=recipe.model.revision, dtype=recipe.model.dtype,
                           attention=recipe.model.attention), prefix, recipe  # fmt: skip


def _load(recipe: Recipe) -> tuple[Base, PreparedData]:
    base = load_base_model(
        recipe.model.base,
        revision=recipe.model.revision,
        dtype=recipe.model.dtype,
        attention=recipe.model.attention,
    )
    config = recipe.prefix
    lengths = inspect_model(base.model).geometry.lengths(
        config.num_virtual_tokens,
        layers=config.layers,
        layer_lengths=config.layer_lengths,
        placements=config.placement,
    )
    positions = max(lengths) if config.position_offset is None else config.position_offset
    data = prepare(recipe.data, base.tokenizer, prefix_tokens=positions, context_tokens=base.context_tokens)
    return base, data


def _train(recipe: Recipe, folder: Path, base: Base, data: PreparedData, report: Report) -> None:
    before = weights_hash(base.model)
    _check_data(folder, data, before)
    write_json(folder / RUN, {"name": recipe.name, "data_hash": data.hash, "base_weights_hash": {"before": before}})
    card = BaseCard(id=base.id, revision=base.revision, fingerprint=fingerprint(base.model))

    def measure(states: PrefixStates) -> float:
        rows = data.validation[: recipe.train.validation_rows]
        candidate = Prefix.from_states(states, base=card, position_offset=recipe.prefix.position_offset)
        return float(heldout_loss(base, rows, prefix=candidate).mean)

    outcome = train_prefix(
        base,
        data.train,
        recipe,
        folder,
        measure=measure,
        report=lambda step, steps, words: report("training", step, steps, words),
    )
    after = weights_hash(base.model)
    if after != before:
        raise TrainingError("the base model's weights changed during training; this is a bug, nothing was saved")
    machine = describe_machine()
    training = TrainingCard(
        recipe=recipe.model_dump(mode="json"),
        seed=recipe.train.seed,
        steps=outcome.steps,
        data_hash=data.hash,
        trained_parameters=outcome.encoder.num_parameters(),
        base_weights_hash=before,
        versions=machine.versions,
    )
    offset = recipe.prefix.position_offset
    licence = recipe.licence or base.licence
    prefix = Prefix.from_states(outcome.states, base=card, position_offset=offset, training=training, licence=licence)
    with atomic_path(folder / "training" / "encoder.safetensors") as path:
        save_file(outcome.encoder.state_dict(), path)
    prefix = prefix.save(folder)
    record = _record(recipe, base, data, outcome, prefix)
    write_json(folder / RUN, record | {"base_weights_hash": {"before": before, "after": after}})


def _check_data(folder: Path, data: PreparedData, weights: str) -> None:
    """A resumed run must meet the data and the base model it was started with."""
    if not (folder / RUN).is_file():
        return
    started = read_json(folder / RUN)
    if started["data_hash"] != data.hash:
        raise TrainingError(f"{folder}: the data changed since this run was started; start another run")
    if started["base_weights_hash"]["before"] != weights:
        raise TrainingError(f"{folder}: the base model changed since this run was started; start another run")


def _record(recipe: Recipe, base: Base, data: PreparedData, outcome: Outcome, prefix: Prefix) -> dict[str, Any]:
    """What run.json keeps."""
    states = prefix.states
    machine = describe_machine()
    return {
        "name": recipe.name,
        "description": recipe.description,
        "recipe": recipe.model_dump(mode="json"),
        "base": {"id": base.id, "revision": base.revision, "fingerprint": prefix.card.base.fingerprint,
                 "dtype": str(base.dtype).removeprefix("torch."), "licence": base.licence},
        "seed": recipe.train.seed,
        "steps": outcome.steps,
        "best_step": outcome.best_step,
        "best_heldout_loss": outcome.best_loss,
        "rollbacks": outcome.rollbacks,
        "tokens": outcome.tokens,
        "seconds": round(outcome.seconds, 3),
        "tokens_per_second": round(outcome.tokens / max(outcome.seconds, 1e-9), 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "trainable_parameters": outcome.encoder.num_parameters(),
        "materialised_bytes": sum(4 * (s.key.numel() + s.value.numel()) for s in states.sites),
        "num_virtual_tokens": states.num_virtual_tokens,
        "data_hash": data.hash,
        "data_counts": asdict(data.counts),
        "machine": asdict(machine),
        "threads": torch.get_num_threads(),
        "versions": machine.versions,
        "content_hash": prefix.card.content_hash,
    }  # fmt: skip


def _measure(recipe: Recipe, folder: Path, base: Base, data: PreparedData, report: Report) -> None:
    prefix = Prefix.load(folder)
    started = time.perf_counter()
    evaluation: Evaluation = evaluate(
        base,
        prefix,
        data,
        recipe,
        on_progress=lambda words, done, total: report("evaluating", done, total, words),
    )
    flat = evaluation.to_flat()
    write_text(
        folder / SAMPLES,
        "".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in evaluation.samples),
    )
    prefix.with_scores({key: value for key, value in flat.items() if isinstance(value, int | float)}).save(folder)
    record = read_json(folder / RUN)
    record["evaluation_seconds"] = round(time.perf_counter() - started, 3)
    record["peak_memory_bytes"] = max(record["peak_memory_bytes"], peak_memory_bytes())
    write_json(folder / RUN, record)
    write_json(folder / SCORES, flat)
    write_report(folder)


def _finished(folder: Path) -> Run:
    if not is_finished(folder):
        raise ArtefactError(f"{folder}: is not finished; go on with `prefixkit train ... --resume`")
    scores = {k: v for k, v in read_json(folder / SCORES).items() if isinstance(v, int | float)}
    return Run(folder, Prefix.load(folder), scores, write_report(folder))
