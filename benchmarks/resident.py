"""Many prefixes beside one model: what loading one takes, what they weigh in memory, and how fast one gives way.

    .venv/bin/python benchmarks/resident.py --out benchmarks/results/resident.json

One prefix of the recipe `positive-reviews`, untrained, is saved and loaded again and again, every time with all
checks, into memory of its own. Exits with 1 where a goal is missed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from contestants import load, untrained_prefix
from prefixkit.config import load_recipe
from prefixkit.files import write_json
from prefixkit.injection import attach
from prefixkit.models import Base
from prefixkit.models.hardware import describe_machine, held_memory_bytes
from prefixkit.prefix import Prefix
from speed import say
from workloads import RECIPE

RESULTS = Path(__file__).parent / "results"
#: Prefixes take turns in long steps (of a prime, so that each has its turn): they do not lie side by side in memory.
STRIDE = 7919
#: Most milliseconds, or bytes per byte of tensors.
GOALS = {"load_ms": 5.0, "switch_ms": 1.0, "bytes_per_tensor_byte": 1.10}


def milliseconds(action: Callable[[int], object], times: int) -> dict[str, float]:
    """Return how long an action takes, given its turn: the median, and the quickest and slowest tenth's border."""
    taken = []
    for turn in range(times):
        started = time.perf_counter()
        action(turn)
        taken.append((time.perf_counter() - started) * 1e3)
    tenths = statistics.quantiles(taken, n=10)
    return {"median": statistics.median(taken), "low": tenths[0], "high": tenths[-1]}


def measure(base: Base, saved: Path, *, prefixes: int, resident: int, times: int) -> dict[str, Any]:
    """Return all measurements.

    Args:
        base: the model.
        saved: an artefact of it.
        prefixes: how many are weighed.
        resident: how many of those attaching and switching choose among.
        times: how often each action is timed.
    """
    loading = milliseconds(lambda _: Prefix.load(saved), times)
    before, held = held_memory_bytes(), list[Prefix]()
    for number in range(prefixes):
        held.append(Prefix.load(saved))
        if (number + 1) % 1000 == 0:
            say(f"{number + 1} of {prefixes} loaded")
    grown = held_memory_bytes() - before
    tensors = sum(t.nbytes for site in held[0].states.sites for t in (site.key, site.value)) * prefixes
    del held[resident:]
    order = [place * STRIDE % resident for place in range(resident)]

    def choose(turn: int, rows: int = 1) -> list[Prefix]:
        return [held[order[(turn * rows + row) % resident]] for row in range(rows)]

    attaching = milliseconds(lambda turn: attach(base.model, choose(turn)[0]).detach(), times)
    with attach(base.model, held[0]) as handle:
        switching = milliseconds(lambda turn: handle.switch(choose(turn)[0]), times)
        mixing = milliseconds(lambda turn: handle.switch(choose(turn, 8)), times)
    return {
        "load_ms": loading,
        "attach_and_detach_ms": attaching,
        "switch_ms": switching,
        "switch_8_rows_ms": mixing,
        "tensor_bytes": tensors,
        "grown_bytes": grown,
        "bytes_per_tensor_byte": grown / tensors,
    }


def check(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the goals with what came out."""
    found = {name: value["median"] if isinstance(value, dict) else value for name, value in measured.items()}
    return [{"what": name, "most": most, "is_met": found[name] <= most} for name, most in GOALS.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefixes", type=int, default=10_000, help="held in memory at once")
    parser.add_argument("--resident", type=int, default=1_000, help="of which one is attached or switched to")
    parser.add_argument("--times", type=int, default=300, help="how often each action is timed")
    parser.add_argument("--out", type=Path, default=RESULTS / "resident.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # nothing here is large
    recipe = load_recipe(RECIPE)
    base = load(recipe)
    with TemporaryDirectory() as folder:
        untrained_prefix(base, recipe).save(folder)
        measured = measure(
            base, Path(folder), prefixes=arguments.prefixes, resident=arguments.resident, times=arguments.times
        )
    goals = check(measured)
    result = {
        "benchmark": "resident",
        "machine": asdict(describe_machine()),
        "num_virtual_tokens": recipe.prefix.num_virtual_tokens,
        "prefixes": arguments.prefixes,
        "resident": arguments.resident,
        "times": arguments.times,
        "measured": measured,
        "goals": goals,
    }
    write_json(arguments.out, result)
    for name, value in measured.items():
        print(f"{name:24} {value}")
    for goal in goals:
        print(f"{'met' if goal['is_met'] else 'MISSED':6} {goal['what']} at most {goal['most']}")
    if not all(goal["is_met"] for goal in goals):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
