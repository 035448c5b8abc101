"""What `prefixkit estimate` says of a run's training, beside what the run took on the same machine.

    python benchmarks/estimate_vs_run.py runs/positive-reviews

Time is that of steps alone: those beside a held-out loss are left out. Writes results/estimate.json. Nothing else
should be running, then as now.
"""

import argparse
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from prefixkit.config import validate_recipe
from prefixkit.errors import PrefixkitError, TrainingError
from prefixkit.files import read_json, write_json
from prefixkit.lab.cost import estimate_run
from prefixkit.models.hardware import choose_threads, describe_machine
from prefixkit.training import read_metrics

RESULTS = Path(__file__).parent / "results" / "estimate.json"


def seconds_per_step(metrics: list[dict[str, Any]]) -> float:
    """The mean over steps that neither end nor begin at a held-out loss."""
    plain = [
        line["seconds"] - before["seconds"]
        for before, line in pairwise(metrics)
        if "heldout_loss" not in before and "heldout_loss" not in line
    ]
    return mean(plain)


def compare(run: Path) -> dict[str, Any]:
    """Estimate a run's recipe, and set it beside the run."""
    record = read_json(run / "run.json")
    recipe = validate_recipe(record["recipe"])
    here, threads = describe_machine(), choose_threads(recipe.train.threads)
    if (record["machine"]["cpu"], record["threads"]) != (here.cpu, threads):
        raise TrainingError(
            f"{run}: was trained on {record['machine']['cpu']} with {record['threads']} threads, this is {here.cpu} "
            f"with {threads}; train it here"
        )
    _, cost = estimate_run(recipe)
    took = seconds_per_step(read_metrics(run / "metrics.jsonl"))
    return {
        "machine": asdict(here),
        "threads": record["threads"],
        "dtype": record["base"]["dtype"],
        "recipe": record["recipe"],
        "estimate": asdict(cost) | {"reached": cost.reached},
        "run": {"seconds_per_step": took, "steps": record["steps"], "peak_bytes": record["peak_memory_bytes"]},
        "time_estimated_over_taken": cost.seconds / took,
        "memory_estimated_over_taken": cost.peak / record["peak_memory_bytes"],
    }


def main() -> int:
    """Write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run")
    options = parser.parse_args()
    try:
        found = compare(options.run)
    except PrefixkitError as error:
        print(error, file=sys.stderr)
        return 1
    write_json(RESULTS, found)
    for name in ("time", "memory"):
        print(f"{name}: {found[f'{name}_estimated_over_taken']:.2f} of what the run took")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
