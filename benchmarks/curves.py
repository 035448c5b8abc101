"""What a training step, a generated token and a switch cost against the work they are given; a slope fitted to each.

    .venv/bin/python benchmarks/curves.py
    .venv/bin/python benchmarks/curves.py --axes rows text --rounds 9

One kind of work grows, the others stay. The points of a curve take turns, so that what the machine does meanwhile meets
all of them. Texts are random tokens, all equally long: nothing is padded. With `--axes` the other curves of the result
file stay as they are.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count as count_up
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import curve_fit
from torch import nn
from transformers import AutoModelForCausalLM

from contestants import conditions, load, untrained_prefix
from prefixkit.config import Recipe, load_recipe
from prefixkit.data import Collator, Example
from prefixkit.files import read_json, write_json
from prefixkit.generation import token_seconds
from prefixkit.injection import attach
from prefixkit.lab.run.memory import measure_footprint
from prefixkit.models import Base
from prefixkit.models.hardware import prepare_processor
from prefixkit.prefix import Prefix
from prefixkit.training import build_encoder
from prefixkit.training.loss import has_plain_head, summed_loss
from resident import STRIDE
from speed import say, spread
from workloads import RECIPE

RESULTS = Path(__file__).parent / "results"
Numbers = NDArray[np.float64]
#: Width, layers, heads, key-value heads and the MLP's width, as the SmolLM2 models of these sizes have them; the first
#: is smaller than any of them.
SHAPES = {
    "20M": (256, 8, 4, 2, 1024),
    "135M": (576, 30, 9, 3, 1536),
    "360M": (960, 32, 15, 5, 2560),
    "1.7B": (2048, 24, 32, 32, 8192),
}


@dataclass(frozen=True)
class Work:
    """What a training step is given."""

    virtual_tokens: int = 20
    text: int = 64
    """Tokens of each text."""
    rows: int = 4


#: What models of several sizes are given: the largest takes seconds for it.
MODEL_WORK = Work(text=32, rows=2)

#: One timed action; where it returns a number, that is the time it took, and otherwise it is timed from outside.
Action = Callable[[], Any]
#: By the value on the axis: the action, and what else is known of it.
Points = dict[float, tuple[Action, dict[str, Any]]]


def training(base: Base, work: Work) -> tuple[Action, dict[str, Any]]:
    """Return a whole optimiser step, and what its backward pass keeps of all rows."""
    recipe, examples = recipe_of(work), texts_of(base, work)
    footprint = measure_footprint(base, examples, recipe, ())
    encoder = build_encoder(base, recipe.prefix, seed=0, texts=[])
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=1e-5)
    batch = Collator(base.tokenizer.pad_token_id)(examples)
    labels = batch.pop("labels")
    plain_head = has_plain_head(base.model)

    def step() -> None:
        with attach(base.model, encoder):
            loss = summed_loss(base.model, batch, labels, plain_head=plain_head) / labels[:, 1:].numel()
            loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), recipe.train.max_grad_norm)
        optimiser.step()
        optimiser.zero_grad()

    return step, {"kept_bytes": work.rows * (sum(footprint.kept) + footprint.elsewhere)}


def recipe_of(work: Work) -> Recipe:
    sizes = {
        "prefix.num_virtual_tokens": work.virtual_tokens,
        "train.batch_size": work.rows,
        "data.max_tokens": work.text,
    }
    return load_recipe(RECIPE, [f"{setting}={size}" for setting, size in sizes.items()])


def texts_of(base: Base, work: Work) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.model.config.vocab_size
    rows = torch.randint(vocabulary, (work.rows, work.text), generator=generator).tolist()
    return [Example("", "", tuple(row), tuple(row)) for row in rows]


def shaped(base: Base, name: str) -> Base:
    """Return a model of another size, with random weights."""
    width, layers, heads, kv_heads, mlp = SHAPES[name]
    config = type(base.model.config)(**base.model.config.to_dict() | {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": mlp, "head_dim": width // heads, "layer_types": None,
    })  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=base.dtype, attn_implementation="sdpa")
    return replace(base, id=name, model=model.eval().requires_grad_(False))


@contextmanager
def training_points(base: Base, field: str, values: Sequence[int]) -> Iterator[Points]:
    """Training steps of one model, of which one kind of work differs."""
    yield {float(value): training(base, replace(Work(), **{field: value})) for value in values}


@contextmanager
def model_points(base: Base) -> Iterator[Points]:
    """Training steps of models of several sizes; the axis is the numbers in their layers."""
    points = {}
    for name in SHAPES:
        say(f"model: {name}")
        other = shaped(base, name)
        layers = sum(p.numel() for p in other.model.parameters()) - other.model.get_input_embeddings().weight.numel()
        step, found = training(other, MODEL_WORK)
        points[float(layers)] = (step, found | {"model": name})
    yield points


@contextmanager
def writing_points(base: Base, values: Sequence[int]) -> Iterator[Points]:
    """One more token of one text, behind prefixes of several lengths."""
    prefixes = {value: untrained_prefix(base, recipe_of(Work(value))) for value in values}

    def write(prefix: Prefix) -> float:
        return statistics.median(token_seconds(base, "Movie review:", tokens=24, prefix=prefix))

    yield {float(value): (partial(write, prefix), {}) for value, prefix in prefixes.items()}


@contextmanager
def switching_points(base: Base, counts: Sequence[int]) -> Iterator[Points]:
    """A switch to another of so many prefixes in memory."""
    with TemporaryDirectory() as folder:
        untrained_prefix(base, recipe_of(Work())).save(folder)
        held = [Prefix.load(folder) for _ in range(max(counts))]
    with attach(base.model, held[0]) as handle:
        turns = count_up()

        def switch(count: int) -> float:
            taken = []
            for turn in islice(turns, 100):
                prefix = held[turn * STRIDE % count]
                started = time.perf_counter()
                handle.switch(prefix)
                taken.append(time.perf_counter() - started)
            return statistics.median(taken)

        yield {float(count): (partial(switch, count), {}) for count in counts}


@dataclass(frozen=True)
class Axis:
    """One curve: what grows, and how its slope is told."""

    title: str
    x: str
    what: str
    points: Callable[[Base], Any]
    is_power: bool = True
    """Fit time = a * x^slope; otherwise time = a * (1 + slope * x)."""
    is_kept_told: bool = True
    """Whether what the backward pass keeps says something; of each further row it is as much, being counted per row."""


AXES = {
    "virtual_tokens": Axis("Length of the prefix", "virtual tokens", "training step",
                           partial(training_points, field="virtual_tokens", values=(1, 10, 20, 50, 100, 200)),
                           is_power=False),
    "text": Axis("Length of the text", "tokens per text", "training step",
                 partial(training_points, field="text", values=(16, 32, 64, 128, 256))),
    "rows": Axis("Rows per batch", "rows", "training step",
                 partial(training_points, field="rows", values=(1, 2, 4, 8, 16)), is_kept_told=False),
    "model": Axis("Size of the model", "numbers in its layers", "training step", model_points),
    "writing": Axis("Length of the prefix", "virtual tokens", "one generated token",
                    partial(writing_points, values=(1, 10, 20, 50, 100, 200)), is_power=False),
    "prefixes": Axis("Prefixes in memory", "prefixes", "switch to another",
                     partial(switching_points, counts=(1, 10, 100, 1000, 10000))),
}  # fmt: skip


def run(axis: Axis, base: Base, rounds: int) -> dict[str, Any]:
    """Time the points of a curve in turns, and fit its slope."""
    with axis.points(base) as points:
        times: dict[float, list[float]] = {x: [] for x in points}
        for turn in range(rounds + 1):
            order = list(points) if turn % 2 == 0 else list(points)[::-1]
            for x in order:
                action = points[x][0]
                started = time.perf_counter()
                own = action()
                seconds = own if isinstance(own, float) else time.perf_counter() - started
                times[x] += [seconds] if turn else []  # the first round fills caches
            say(f"{axis.title}, {axis.what}: round {turn} of {rounds}")
        found = [{"x": x, "seconds": spread(times[x])} | points[x][1] for x in points]
    return {"title": axis.title, "x": axis.x, "what": axis.what, "is_power": axis.is_power, "points": found,
            "fit": fit([p["x"] for p in found], [p["seconds"]["median"] for p in found], is_power=axis.is_power),
            "kept": fit_kept(found, is_power=axis.is_power) if axis.is_kept_told else None}  # fmt: skip


def fit(xs: Sequence[float], ys: Sequence[float], *, is_power: bool) -> dict[str, float]:
    """Return the slope with its 95% interval: the exponent of x, or the share of the start that one more x adds."""

    def line(x: Numbers, start: float, slope: float) -> Numbers:
        return start + slope * x if is_power else start * (1 + slope * x)

    x, y = np.asarray(xs), np.asarray(ys)
    x, y = (np.log(x), np.log(y)) if is_power else (x, y)
    plain = stats.linregress(x, y)
    guess = (plain.intercept, plain.slope if is_power else plain.slope / plain.intercept)
    (start, slope), covariance = curve_fit(line, x, y, p0=guess)
    wide = stats.t.ppf(0.975, len(x) - 2) * np.sqrt(covariance[1, 1])
    found = {"slope": slope, "low": slope - wide, "high": slope + wide, "start": np.exp(start) if is_power else start}
    return {name: float(value) for name, value in found.items()}


def fit_kept(points: list[dict[str, Any]], *, is_power: bool) -> dict[str, float] | None:
    if any("kept_bytes" not in point for point in points):
        return None
    return fit([p["x"] for p in points], [p["kept_bytes"] for p in points], is_power=is_power)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "curves.json")
    arguments = parser.parse_args()
    prepare_processor()
    torch.manual_seed(0)
    base = load(load_recipe(RECIPE))
    known = read_json(arguments.out)["curves"] if arguments.out.is_file() else {}
    known |= {name: run(AXES[name], base, arguments.rounds) for name in arguments.axes}
    curves = {name: known[name] for name in AXES if name in known}
    result = {
        "benchmark": "curves",
        **conditions(base),
        "rounds": arguments.rounds,
        "work": asdict(Work()),
        "model_work": asdict(MODEL_WORK),
        "curves": curves,
    }
    write_json(arguments.out, result)
    for name, curve in curves.items():
        told = curve["fit"]
        print(f"{name:16} {'exponent' if curve['is_power'] else 'share per unit'} {told['slope']:.5f} "
              f"[{told['low']:.5f}, {told['high']:.5f}]")  # fmt: skip


if __name__ == "__main__":
    main()
