"""Quality beside PEFT: LoRA, PEFT's prefix tuning and prefixkit, same batches, same number of parameters.

    python benchmarks/quality_vs_peft.py                     all methods, the recipe's number of steps
    python benchmarks/quality_vs_peft.py --methods lora      one of them; results already in --out are kept

Equal for every trial: base model and dtype, batches and their order (a hash of the token ids is compared),
steps, AdamW with warm-up and decay, clipping, and the loss: mean cross-entropy over a batch's scored tokens.
A method's rate is chosen on validation rows; what is reported comes from test rows, at the last step, without
early stopping. The result file is rewritten after every trial: an interrupted benchmark goes on from there.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import get_scheduler

from contestants import BUILDERS, LORA, PEFT_PREFIX, PREFIXKIT, Contestant, Loss, batches, load, logits_loss
from prefixkit.config import Recipe, load_recipe
from prefixkit.data import NO_LOSS, Collator, Example, PreparedData, keep_examples
from prefixkit.errors import PrefixkitError, TrainingError
from prefixkit.files import read_json, write_json
from prefixkit.lab.run.likeliest import likeliest
from prefixkit.lab.run.loading import load_for
from prefixkit.models.fingerprint import fingerprint
from prefixkit.models.hardware import choose_threads, describe_machine
from prefixkit.seeding import derive
from prefixkit.training.loss import has_plain_head, summed_loss

RECIPE = "positive-reviews"
METHODS = [PREFIXKIT, LORA, PEFT_PREFIX]
#: The two ways of scoring must give the base model the same loss, up to rounding in its dtype.
SCORING_TOLERANCE = 1e-3


@torch.no_grad()
def score(model: nn.Module, loss: Loss, examples: Sequence[Example]) -> list[float]:
    """Return each example's summed cross-entropy, one example at a time, so that nothing is padded."""
    was_training = model.training
    model.eval()
    collate = Collator(None)
    sums = []
    for example in examples:
        batch = collate([example])
        labels = batch.pop("labels")
        sums.append(float(loss(batch, labels)))
    model.train(was_training)
    return sums


def scored_tokens(examples: Sequence[Example]) -> list[int]:
    """Return each example's number of scored tokens; the first token of a text is never predicted."""
    return [sum(label != NO_LOSS for label in example.labels[1:]) for example in examples]


def mean_loss(sums: Sequence[float], examples: Sequence[Example]) -> float:
    return sum(sums) / sum(scored_tokens(examples))


def run_trial(method: str, rate: float, recipe: Recipe, data: PreparedData, test: Sequence[Example]) -> dict[str, Any]:
    """Train one method at one rate from a freshly loaded base model; returns its entry in the result file."""
    base = load(recipe)
    with torch.random.fork_rng():
        torch.manual_seed(derive(recipe.train.seed, "benchmark.init"))  # PEFT draws from the global stream
        contestant = BUILDERS[method](base, recipe, data)
        entry = {"method": method, "learning_rate": rate, "details": contestant.details}
        return entry | train(contestant, rate, recipe, data, test, Collator(base.tokenizer.pad_token_id))


def train(
    contestant: Contestant, rate: float, recipe: Recipe, data: PreparedData, test: Sequence[Example], collate: Collator
) -> dict[str, Any]:
    """Train and measure; returns curve, losses and what proves that every trial saw the same batches."""
    config, model = recipe.train, contestant.model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=config.weight_decay)
    scheduler = get_scheduler(str(config.schedule), optimiser, round(config.warmup * config.steps), config.steps)
    validation = data.validation[: config.validation_rows]
    trial: dict[str, Any] = {
        "trainable_parameters": sum(p.numel() for p in parameters),
        "trainable_dtype": str(parameters[0].dtype).removeprefix("torch."),
    }
    curve = [{"step": 0, "validation_loss": mean_loss(score(model, contestant.loss, validation), validation)}]
    digest, seconds, stream = hashlib.sha256(), 0.0, batches(data, recipe, collate)
    for step in range(1, config.steps + 1):
        batch = next(stream)
        digest.update(batch["input_ids"].numpy().tobytes())
        started = time.perf_counter()
        labels = batch.pop("labels")
        loss = contestant.loss(batch, labels) / (labels[:, 1:] != NO_LOSS).sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        if not torch.isfinite(loss + norm):
            return trial | {"curve": curve, "diverged_at": step}
        optimiser.step()
        scheduler.step()
        optimiser.zero_grad()
        seconds += time.perf_counter() - started
        if step % config.evaluate_every == 0 or step == config.steps:
            measured = mean_loss(score(model, contestant.loss, validation), validation)
            curve.append({"step": step, "train_loss": float(loss.detach()), "validation_loss": measured})
            say(f"  step {step} of {config.steps}: validation loss {measured:.4f}")
    sums = score(model, contestant.loss, test)
    return trial | {
        "curve": curve,
        "batches_sha256": digest.hexdigest(),
        "seconds_per_step": seconds / config.steps,
        "validation_loss": curve[-1]["validation_loss"],
        "test_loss": mean_loss(sums, test),
        "test_sums": sums,
    }


def score_base(recipe: Recipe, data: PreparedData) -> dict[str, Any]:
    """Score the base model both ways; unless they agree, comparing methods across them means nothing."""
    base, test = load(recipe), test_rows(recipe, data)
    plain = has_plain_head(base.model)
    ours = score(base.model, lambda b, y: summed_loss(base.model, b, y, plain_head=plain), test)
    theirs = score(base.model, logits_loss(base.model), test)
    difference = abs(mean_loss(ours, test) - mean_loss(theirs, test))
    if difference > SCORING_TOLERANCE:
        raise TrainingError(f"the two ways of scoring differ by {difference:.3g} nats per token on the base model")
    return {
        "test_loss": mean_loss(ours, test),
        "test_sums": ours,
        "scoring_difference": difference,
        "fingerprint": fingerprint(base.model),
        "dtype": str(base.dtype).removeprefix("torch."),
    }


def bootstrap(a: Sequence[float], b: Sequence[float], tokens: Sequence[int], recipe: Recipe) -> dict[str, float]:
    """Return a's loss minus b's, nats per token, with the 95% interval of resampled test examples."""
    settings = recipe.evaluation
    rng = np.random.default_rng(derive(settings.seed, "benchmark.bootstrap"))
    gap, weight = np.asarray(a) - np.asarray(b), np.asarray(tokens)
    rows = rng.integers(len(gap), size=(settings.bootstrap, len(gap)))  # [resamples, examples]
    resampled = gap[rows].sum(axis=1) / weight[rows].sum(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"difference": float(gap.sum() / weight.sum()), "low": float(low), "high": float(high)}


def summarise(result: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Choose each method's rate on validation rows and compare prefixkit with the others on test rows."""
    finished = [trial for trial in result["trials"] if "diverged_at" not in trial]
    if len({trial["batches_sha256"] for trial in finished}) > 1:
        raise TrainingError("trials saw different batches; delete the result file and run all of them again")
    best: dict[str, Any] = {}
    for trial in sorted(finished, key=lambda trial: -trial["validation_loss"]):
        best[trial["method"]] = trial
    compared = {name: trial["test_sums"] for name, trial in best.items()} | {"base": result["base"]["test_sums"]}
    differences = {
        f"{PREFIXKIT} - {other}": bootstrap(compared[PREFIXKIT], sums, result["data"]["test_tokens"], recipe)
        for other, sums in compared.items()
        if PREFIXKIT in compared and other != PREFIXKIT
    }
    chosen = {
        name: {key: trial[key] for key in ("learning_rate", "validation_loss", "test_loss")}
        for name, trial in best.items()
    }
    return result | {"best": chosen, "differences": differences}


def test_rows(recipe: Recipe, data: PreparedData) -> tuple[Example, ...]:
    return data.test[: recipe.evaluation.heldout_rows]


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def conditions(benchmark: str, recipe: Recipe) -> dict[str, Any]:
    """Return what a result says of how it was made."""
    return {
        "benchmark": benchmark,
        "machine": asdict(describe_machine()),
        "peft": version("peft"),
        "threads": torch.get_num_threads(),
        "recipe": recipe.model_dump(mode="json"),
    }


def made_before(setting: dict[str, Any], out: Path) -> dict[str, Any] | None:
    """Return the result that is there already; None if there is none.

    Raises:
        TrainingError: it was made in another way.
    """
    if not out.exists():
        return None
    found = read_json(out)
    if {key: found.get(key) for key in setting} != setting:
        raise TrainingError(f"{out}: made with other settings or versions; give another --out or delete it")
    return found


def start(recipe: Recipe, out: Path) -> tuple[dict[str, Any], PreparedData]:
    """Prepare the data, and the result file: what is in it already counts if it was made in the same way."""
    base, data = load_for(recipe)
    if recipe.data.likeliest < 1:
        say("choosing the likeliest examples")
        data = keep_examples(data, likeliest(base, data.train, recipe.data.likeliest))
    test_tokens = scored_tokens(test_rows(recipe, data))
    setting = conditions("quality_vs_peft", recipe) | {
        "data": {"hash": data.hash, "counts": asdict(data.counts), "test_tokens": test_tokens},
    }
    if (found := made_before(setting, out)) is not None:
        return found, data
    return setting | {"base": score_base(recipe, data), "trials": []}, data


def parse_arguments() -> argparse.Namespace:
    default_out = Path(__file__).parent / "results" / "quality_vs_peft.json"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--steps", type=int, help="optimiser steps of every trial; the recipe's if left out")
    parser.add_argument("--rates-lora", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3, 5e-3])
    parser.add_argument("--rates-prefix", nargs="+", type=float, default=[5e-3, 2e-2, 5e-2], help="PEFT's prefix")
    parser.add_argument("--rates-prefixkit", nargs="+", type=float, help="the recipe's one rate if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads; as many as the machine gives if left out")
    parser.add_argument("--out", type=Path, default=default_out)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    overrides = [f"train.seed={arguments.seed}"]
    overrides += [f"train.steps={arguments.steps}"] if arguments.steps is not None else []
    recipe = load_recipe(RECIPE, overrides)
    torch.set_num_threads(choose_threads(arguments.threads))
    rates = {
        PREFIXKIT: arguments.rates_prefixkit or [recipe.train.learning_rate],
        LORA: arguments.rates_lora,
        PEFT_PREFIX: arguments.rates_prefix,
    }
    result, data = start(recipe, arguments.out)
    done = {(trial["method"], trial["learning_rate"]) for trial in result["trials"]}
    for method in arguments.methods:
        for rate in rates[method]:
            if (method, rate) in done:
                continue
            say(f"{method}, rate {rate:g}")
            result["trials"].append(run_trial(method, rate, recipe, data, test_rows(recipe, data)))
            result = summarise(result, recipe)
            write_json(arguments.out, result)
    show(result)


def show(result: dict[str, Any]) -> None:
    print(f"{'method':12} {'rate':>8} {'test loss':>10}   prefixkit minus it, nats per token [95%]")
    for name, row in ({"base": result["base"]} | result.get("best", {})).items():
        gap = result.get("differences", {}).get(f"{PREFIXKIT} - {name}")
        words = f"{gap['difference']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]" if gap else ""
        print(f"{name:12} {row.get('learning_rate', ''):>8} {row['test_loss']:10.4f}   {words}")


if __name__ == "__main__":
    try:
        main()
    except PrefixkitError as error:
        sys.exit(str(error))
