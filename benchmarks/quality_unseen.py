"""The comparison of `quality_vs_peft.py` once more, over seeds, on test rows that took no part in choosing.

    python benchmarks/quality_unseen.py

Which rows the recipe learns from, for how many steps and at which rate was chosen while looking at 128 test rows of
that benchmark and at those a run is measured on. Here are the others. Rates are those that were chosen there: nothing
is chosen here. The result file is rewritten after every trial: an interrupted benchmark goes on from there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from contestants import LORA, PREFIXKIT
from prefixkit.config import load_recipe
from prefixkit.data import Example, keep_examples
from prefixkit.errors import PrefixkitError, TrainingError
from prefixkit.evaluation.picking import pick
from prefixkit.files import read_json, write_json
from prefixkit.lab.run.likeliest import likeliest
from prefixkit.lab.run.loading import load_for
from prefixkit.models.hardware import choose_threads
from quality_vs_peft import RECIPE, bootstrap, conditions, made_before, run_trial, say, scored_tokens, test_rows

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)


def unseen(test: Sequence[Example], seen: Sequence[Example]) -> tuple[Example, ...]:
    """Return the test rows that took no part in choosing."""
    known = {example.input_ids for example in seen}
    return tuple(example for example in test if example.input_ids not in known)


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """Compare the prefix with LoRA: on each row the mean over seeds, and seed by seed."""
    recipe, tokens = load_recipe(RECIPE), result["data"]["test_tokens"]
    sums = {(trial["method"], trial["seed"]): trial["test_sums"] for trial in result["trials"]}
    batches = {(trial["seed"], trial["batches_sha256"]) for trial in result["trials"]}
    if len(batches) > len({seed for seed, _ in batches}):
        raise TrainingError("two trials of one seed saw different batches; delete the result and run all of them again")
    seeds = [seed for seed in SEEDS if (PREFIXKIT, seed) in sums and (LORA, seed) in sums]
    if not seeds:
        return result
    own, other = (np.mean([sums[method, seed] for seed in seeds], axis=0).tolist() for method in (PREFIXKIT, LORA))
    by_seed = [bootstrap(sums[PREFIXKIT, seed], sums[LORA, seed], tokens, recipe) for seed in seeds]
    losses = {PREFIXKIT: sum(own) / sum(tokens), LORA: sum(other) / sum(tokens)}
    return result | {
        "seeds": seeds, "test_loss": losses, "difference": bootstrap(own, other, tokens, recipe), "by_seed": by_seed,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="CPU threads; as many as the machine gives if left out")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality_unseen.json")
    arguments = parser.parse_args()
    torch.set_num_threads(choose_threads(arguments.threads))
    chosen = read_json(RESULTS / "quality_vs_peft.json")["best"]
    rates = {method: chosen[method]["learning_rate"] for method in (PREFIXKIT, LORA)}
    recipe = load_recipe(RECIPE)
    base, data = load_for(recipe)
    test = unseen(data.test, [*test_rows(recipe, data), *pick(data.test, recipe.evaluation.heldout_rows)])
    say("choosing the likeliest examples")
    data = keep_examples(data, likeliest(base, data.train, recipe.data.likeliest))
    setting = conditions("quality_unseen", recipe) | {
        "rates": rates,
        "data": {"hash": data.hash, "rows": len(test), "test_tokens": scored_tokens(test)},
    }
    result = made_before(setting, arguments.out) or setting | {"trials": []}
    done = {(trial["method"], trial["seed"]) for trial in result["trials"]}
    for seed in SEEDS:
        for method in (PREFIXKIT, LORA):
            if (method, seed) not in done:
                say(f"seed {seed}, {method}, rate {rates[method]:g}")
                seeded = load_recipe(RECIPE, [f"train.seed={seed}"])
                trial = run_trial(method, rates[method], seeded, data, test)
                result["trials"].append({"seed": seed} | trial)
                result = summarise(result)
                write_json(arguments.out, result)
    for name in ("test_loss", "difference", "by_seed"):
        print(name, result[name])


if __name__ == "__main__":
    try:
        main()
    except PrefixkitError as error:
        sys.exit(str(error))
