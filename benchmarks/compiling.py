"""Where a training step's time goes, and what compiling the layers' parts beside attention would save of it.

    .venv/bin/python benchmarks/compiling.py

Steps of the recipe `positive-reviews` on all clear rows, with and without compiled parts (torch.compile of every MLP
and norm, one by one, for any shape), by turns on the same batches. Compiling begins with an empty cache and needs a
C++ compiler. Exits with 1 where the losses differ.
"""

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from contestants import BUILDERS, PREFIXKIT, batches, conditions
from prefixkit.config import load_recipe
from prefixkit.data import Collator
from prefixkit.files import write_json
from prefixkit.lab.run.loading import load_for
from prefixkit.models.hardware import prepare_processor
from speed import say, spread
from workloads import RECIPE

RESULTS = Path(__file__).parent / "results"
#: Beginnings of the operators' names, and what they do; the rest is work number by number, copying and bookkeeping.
OPERATORS = {"aten::mm": "matrix products", "aten::addmm": "matrix products", "aten::_scaled_dot_product": "attention"}
REST = "everything else"
#: Batches of several shapes that compiling is over with, and how near their losses must be.
SHAPES, CLOSE = 4, 1e-5

Batch = dict[str, Tensor]
Step = Callable[[Batch], float]


class Compiled:
    """Modules that run compiled while this is entered; what is compiled for one of a class is taken for the others."""

    def __init__(self, parts: list[nn.Module]) -> None:
        for part in parts:
            part.compile(dynamic=True)
        self._calls = {part: part._compiled_call_impl for part in parts}
        self.__exit__()

    def __enter__(self) -> None:
        for part, call in self._calls.items():
            part._compiled_call_impl = call

    def __exit__(self, *_: object) -> None:
        for part in self._calls:
            part._compiled_call_impl = None


def shares(step: Step, batch: Batch) -> dict[str, float]:
    """Return the share of a step's time by kind of operator."""
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        step(batch)
    times: Counter[str] = Counter()
    for event in watched.key_averages():
        kind = next((kind for start, kind in OPERATORS.items() if event.key.startswith(start)), REST)
        times[kind] += event.self_cpu_time_total
    return {kind: value / times.total() for kind, value in times.most_common()}


def timed(step: Step, given: Sequence[Batch]) -> tuple[float, list[float]]:
    """Return how long steps took together, and their losses."""
    started = time.perf_counter()
    losses = [step(batch) for batch in given]
    return time.perf_counter() - started, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "compiling.json")
    arguments = parser.parse_args()
    prepare_processor()
    recipe = load_recipe(RECIPE, ["data.likeliest=1"])
    base, data = load_for(recipe)
    model = BUILDERS[PREFIXKIT](base, recipe, data)
    parts = [part for part in base.model.modules() if type(part).__name__.endswith(("MLP", "Norm"))]

    def step(batch: Batch) -> float:
        """Without an optimiser, so that each step of a batch has the same loss."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        loss = model.loss(inputs, batch["labels"])
        loss.backward()
        model.model.zero_grad()
        return loss.item()

    warm, *given = islice(batches(data, recipe, Collator(base.tokenizer.pad_token_id)), arguments.rounds + 1)
    step(warm)
    say("looking where the time goes")
    spent = shares(step, warm)
    with TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        taken = {}
        for what in ("first", "again"):
            say(f"compiling, {what}")
            torch.compiler.reset()
            compiled = Compiled(parts)
            with compiled:
                taken[what] = timed(step, given[:SHAPES])[0] - timed(step, given[:SHAPES])[0]
        ratios, apart = [], 0.0
        for place, batch in enumerate(given):
            plain, (loss,) = timed(step, [batch])
            with compiled:
                quick, (other,) = timed(step, [batch])
            ratios.append(quick / plain)
            apart = max(apart, abs(other - loss) / loss)
            say(f"round {place + 1} of {len(given)}: {quick / plain:.3f}")
    result = {
        "benchmark": "compiling",
        **conditions(base),
        "rounds": arguments.rounds,
        "parts": len(parts),
        "spent": spent,
        "seconds_to_compile": taken,
        "time_beside_plain": spread(ratios),
        "losses_apart": apart,
    }
    write_json(arguments.out, result)
    for name in ("spent", "seconds_to_compile", "time_beside_plain", "losses_apart"):
        print(f"{name:20} {result[name]}")
    if apart > CLOSE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
