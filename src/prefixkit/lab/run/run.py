"""One run, end to end: train, measure, save, report. Every step can be interrupted and resumed."""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from prefixkit import processes
from prefixkit.config import Attention, Method, Recipe
from prefixkit.data import PreparedData, check_batch_size, longest_first
from prefixkit.errors import ConfigError, DivergedError, TrainingError
from prefixkit.evaluation import evaluate, evaluate_labels, heldout_loss, label_losses, validation_rows
from prefixkit.evaluation.picking import hash_of_texts, pick
from prefixkit.files import atomic_path, write_json, write_text
from prefixkit.lab.run.agreement import check_alike, check_artefact, check_shared, check_unchanged
from prefixkit.lab.run.attending import training_attention
from prefixkit.lab.run.folder import (
    ATTENTION,
    BY_TEXT,
    LIKELIEST,
    PREDICTIONS,
    RECIPE,
    REPORT,
    RUN,
    SAMPLES,
    SCORES,
    TRAINING,
    check_run,
    is_measured,
    locked,
    measured_with,
    open_run,
    read_recipe,
    read_record,
)
from prefixkit.lab.run.likeliest import keep_likeliest
from prefixkit.lab.run.loading import load_for
from prefixkit.lab.run.memory import fit_to_budget, measure_footprint, sized_like
from prefixkit.lab.run.report import write_report
from prefixkit.logs import get_logger
from prefixkit.methods import check_installed
from prefixkit.models import Base
from prefixkit.models.fingerprint import fingerprint, weights_hash
from prefixkit.models.hardware import describe_machine, give_back_memory, peak_memory_bytes, prepare_processor
from prefixkit.models.sharding import is_sharded, shard
from prefixkit.prefix import BaseCard, Prefix, TrainingCard
from prefixkit.training import Outcome, Trained, check_trackers, train_prefix

log = get_logger(__name__)

#: Told what is going on: what, how much is done, of how much, and a few words.
Report = Callable[[str, int, int, str], None]


def tell_nobody(what: str, done: int, total: int, words: str) -> None:
    """Be a `Report` that nobody reads."""


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


def train_run(
    recipe: Recipe,
    folder: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    memory_budget: int | None = None,
    report: Report = tell_nobody,
) -> Run:
    """Run a recipe; in several processes at once if `torchrun` or `accelerate launch` started them.

    Args:
        recipe: what to run.
        folder: the run folder.
        resume: go on with what is there; a finished run is returned as it is.
        overwrite: throw away what is there.
        memory_budget: bytes each process is to stay within: batches, gradient checkpointing and texts generated at a
            time are chosen to fit, rows per optimiser step staying what the recipe says. A run that is resumed keeps
            what was chosen.
        report: told about progress; nobody is if left out.

    Raises:
        PrefixkitError: with one line that says what is wrong; what was saved before stays.
        KeyboardInterrupt: Ctrl-C; go on with `resume`.
    """
    folder = Path(folder)
    if resume and memory_budget is not None and (folder / RECIPE).is_file():
        recipe, memory_budget = sized_like(recipe, read_recipe(folder)), None
    check_batch_size(recipe.train.batch_size, processes.count())
    if memory_budget is not None and recipe.model.attention is Attention.FASTEST:
        raise ConfigError("--memory-budget saves memory and model.attention=fastest time; set it to sdpa, or eager")
    if memory_budget is not None and recipe.model.shard and processes.count() > 1:
        raise ConfigError("--memory-budget measures a whole base model; leave it out, or set model.shard to false")
    processes.join()
    check_run(folder, recipe, resume=resume, overwrite=overwrite)
    if resume and is_measured(folder, recipe):
        log.info("%s is finished already", folder)
        return _finished(folder)
    check_installed(recipe.method.kind)
    check_trackers(recipe.train.report_to)
    prepare_processor(recipe.train.threads)
    base, data = load_for(recipe)
    check_alike(base, data)
    if memory_budget is not None:
        footprint = measure_footprint(base, longest_first(data, recipe.data.max_tokens), recipe, data.classes)
        fit = processes.from_first(fit_to_budget(footprint, recipe, memory_budget, processes=processes.count()))
        log.info("%s", fit)
        recipe = fit.apply(recipe)
    if recipe.model.shard:
        shard(base.model)
    with locked(folder) if processes.is_first() else nullcontext():
        check_run(folder, recipe, resume=resume, overwrite=overwrite)  # another may have trained here meanwhile
        processes.wait()
        if processes.is_first():
            open_run(folder, recipe, overwrite=overwrite)  # only now: what cannot be loaded costs no run
        processes.wait()
        check_shared(folder)
        check_unchanged(folder, base, data)
        data = _choose(recipe, folder, base, data, report)
        if "content_hash" not in read_record(folder / RUN):
            _train(recipe, folder, base, data, report)
        processes.wait()  # the first has written the prefix
        if processes.is_first() or is_sharded(base.model):
            _measure(recipe, folder, base, data, report)
        processes.wait()
    return _finished(folder)


def evaluate_run(folder: Path | str, recipe: Recipe, *, report: Report = tell_nobody) -> Run:
    """Measure a trained run again, with the evaluation settings of `recipe`.

    Args:
        folder: the run folder.
        recipe: the run's, its evaluation, its generation or its number of threads changed.
        report: told about progress; nobody is if left out.

    Raises:
        ArtefactError: the run is not trained to its end, or the artefact is not the one it ended in.
        TrainingError: the data or the base model are no longer those it was trained on, or another process works there.
    """
    if processes.count() > 1:
        raise ConfigError("measuring a run takes one process; start it without torchrun or accelerate launch")
    folder = Path(folder)
    Prefix.load(folder)
    prepare_processor(recipe.train.threads)
    with locked(folder):
        base, data = load_for(recipe)
        check_unchanged(folder, base, data)
        data = _choose(recipe, folder, base, data, report)
        _measure(recipe, folder, base, data, report)
    return _finished(folder)


def _choose(recipe: Recipe, folder: Path, base: Base, data: PreparedData, report: Report) -> PreparedData:
    share = recipe.data.likeliest
    return keep_likeliest(folder, base, data, share, lambda done, rows: report("choosing examples", done, rows, ""))


def _train(recipe: Recipe, folder: Path, base: Base, data: PreparedData, report: Report) -> None:
    before = weights_hash(base.model)
    processes.wait()  # each has looked whether there is a record already
    if processes.is_first():
        started = {"name": recipe.name, "data_hash": data.hash, "base_weights_hash": {"before": before}}
        write_json(folder / RUN, started)
    card = BaseCard(id=base.id, revision=base.revision, fingerprint=fingerprint(base.model))

    def measure(trained: Trained) -> float:
        rows = validation_rows(data, recipe)
        candidate = _as_prefix(trained, recipe, card)
        measured = (
            heldout_loss(base, rows, prefix=candidate) if trained.head is None else label_losses(base, rows, candidate)
        )
        return float(measured.mean)

    try:
        with training_attention(folder, base, data.train, recipe):
            outcome = train_prefix(
                base,
                data.train,
                recipe,
                folder,
                stream=data.stream,
                classes=data.classes,
                measure=measure,
                report=lambda step, steps, words: report("training", step, steps, words),
            )
    except DivergedError as error:
        if processes.is_first():
            write_json(folder / RUN, read_record(folder / RUN) | {"diverged": str(error)})
        raise
    after = weights_hash(base.model)
    if after != before:
        raise TrainingError("the base model's weights changed during training; this is a bug, nothing was saved")
    if processes.is_first():
        _save(recipe, folder, base, data, outcome, card, before)


def _save(
    recipe: Recipe, folder: Path, base: Base, data: PreparedData, outcome: Outcome, card: BaseCard, weights: str
) -> None:
    """Write the artefact, the encoder to train on from, and the record."""
    machine = describe_machine()
    training = TrainingCard(
        recipe=recipe.model_dump(mode="json"),
        seed=recipe.train.seed,
        steps=outcome.steps,
        data_hash=data.hash,
        trained_parameters=outcome.trained_parameters,
        base_weights_hash=weights,
        versions=machine.versions,
    )
    licence = recipe.licence or base.licence
    prefix = _as_prefix(outcome.trained, recipe, card, training=training, licence=licence)
    with atomic_path(folder / TRAINING / "encoder.safetensors") as path:
        path.write_bytes(save(outcome.state))
    prefix = prefix.save(folder)
    record = _record(recipe, base, data, outcome, prefix)
    if "seconds" in (chosen := read_record(folder / TRAINING / LIKELIEST)):
        record["choosing_seconds"] = chosen["seconds"]
    if timed := read_record(folder / TRAINING / ATTENTION):
        record["attention"] = timed
    write_json(folder / RUN, record | {"base_weights_hash": {"before": weights, "after": weights}})


def _as_prefix(trained: Trained, recipe: Recipe, card: BaseCard, **details: Any) -> Prefix:
    """Return what was trained as an artefact."""
    has_tokens = any(trained.states.lengths)
    return Prefix.from_states(
        trained.states,
        base=card,
        position_offset=recipe.prefix.position_offset if has_tokens else None,
        head=trained.head,
        deltas=trained.deltas,
        infix=recipe.method.kind is Method.INFIX,
        **details,
    )


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
        "trainable_parameters": outcome.trained_parameters,
        "parts": list(prefix.parts),
        "materialised_bytes": prefix.nbytes,
        "flops_per_token": prefix.flops_per_token,
        "num_virtual_tokens": states.num_virtual_tokens,
        "data_hash": data.hash,
        "rows_hash": None if data.stream is not None else hash_of_texts(pick(data.train, len(data.train))),
        "data_counts": asdict(data.counts),
        "machine": asdict(machine),
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
        "sharded": is_sharded(base.model),
        "versions": machine.versions,
        "content_hash": prefix.card.content_hash,
    }  # fmt: skip


def _measure(recipe: Recipe, folder: Path, base: Base, data: PreparedData, report: Report) -> None:
    give_back_memory()
    prefix = Prefix.load(folder)
    check_artefact(folder, prefix)
    started = time.perf_counter()
    measure = evaluate_labels if data.classes else evaluate
    evaluation = measure(
        base,
        prefix,
        data,
        recipe,
        on_progress=lambda words, done, total: report("evaluating", done, total, words),
    )
    if not processes.is_first():
        return  # its part of a sharded base model was needed
    flat = evaluation.to_flat()
    flat["measured_with"] = measured_with(recipe)
    (folder / SCORES).unlink(missing_ok=True)  # without them it is not measured: no half of it counts
    name, lines = (PREDICTIONS, evaluation.predictions) if data.classes else (SAMPLES, evaluation.samples)
    write_text(folder / name, "".join(json.dumps(asdict(line), ensure_ascii=False) + "\n" for line in lines))
    write_json(folder / BY_TEXT, {"texts": evaluation.texts, "influences": evaluation.to_influences()})
    prefix.with_scores({key: value for key, value in flat.items() if isinstance(value, int | float)}).save(folder)
    record = read_record(folder / RUN)
    record["evaluation_seconds"] = round(time.perf_counter() - started, 3)
    record["peak_memory_bytes"] = max(record.get("peak_memory_bytes", 0), peak_memory_bytes())
    write_json(folder / RUN, record)
    write_json(folder / SCORES, flat)


def _finished(folder: Path) -> Run:
    scores = {k: v for k, v in read_record(folder / SCORES).items() if isinstance(v, int | float)}
    report = write_report(folder) if processes.is_first() else folder / REPORT
    return Run(folder, Prefix.load(folder), scores, report)
