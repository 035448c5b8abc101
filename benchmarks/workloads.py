"""One contestant in a process of its own: it waits for its turn, works, says how long it took, and waits again.

`speed.py` starts one such process per contestant and lets them take turns, so that they share whatever the machine
does meanwhile, and none shares its memory with another. Read from stdin: ``round``, answered by a line of JSON with
seconds and tokens; and ``end``, answered by one with the peak of resident memory during the rounds.
"""

import contextlib
import json
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contestants import BUILDERS, PEFT_PREFIX, batches, load, untrained_prefix
from prefixkit.config import Recipe, load_recipe
from prefixkit.data import NO_LOSS, Collator, PreparedData
from prefixkit.injection import attach
from prefixkit.lab.cost import linear_products
from prefixkit.models import Base
from prefixkit.models.hardware import choose_threads, peak_memory_bytes, prepare_processor

RECIPE = "positive-reviews"
FLOOR, GENERATION = "floor", "generation"

#: Work of one turn for a batch; returns the real tokens it counted.
Step = Callable[[dict[str, Tensor]], int]


@dataclass(frozen=True)
class Spec:
    """What one process is to do."""

    name: str
    """As the result file calls it."""
    method: str
    """A name of `BUILDERS`; ``floor``: the matrix products of a step alone; ``generation`` and a kind."""
    kind: str = ""
    """Of generation: base, prefix, mixed or peft-prefix."""
    overrides: list[str] = field(default_factory=list)
    """Of the recipe."""
    steps: int = 4
    """Batches per round."""
    prompt: int = 256
    """Of generation: tokens of each prompt."""
    keeps_memory: bool = True
    """Whether memory that is let go is kept for the next tensor, as prefixkit's own runs do; rivals get it too."""


def training_step(method: str, base: Base, recipe: Recipe, data: PreparedData) -> Step:
    """A whole optimiser step, as `quality_vs_peft` takes it."""
    contestant = BUILDERS[method](base, recipe, data)
    model = contestant.model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-5)  # the numbers must not run away; the work is the same

    def step(batch: dict[str, Tensor]) -> int:
        labels = batch["labels"]
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        loss = contestant.loss(inputs, labels) / (labels[:, 1:] != NO_LOSS).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.train.max_grad_norm)
        optimiser.step()
        optimiser.zero_grad()
        return int(batch["attention_mask"].sum())

    return step


def matmul_floor(base: Base, recipe: Recipe) -> Step:
    """The matrix products that no prefix tuning of this model can do without, and nothing else.

    Forward and, for the inputs, backward of every linear layer, on real tokens only; the head at as many positions.
    """
    multiply = linear_products(base, most=recipe.train.batch_size * recipe.data.max_tokens)

    def step(batch: dict[str, Tensor]) -> int:
        tokens = int(batch["attention_mask"].sum())
        multiply(tokens)
        return tokens

    return step


@torch.no_grad()
def generation_step(kind: str, prompt: int, base: Base, recipe: Recipe, data: PreparedData) -> Step:
    """Greedy continuations of prompts of so many tokens, the batch's own over and over, all equally long."""
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    texts = [example.text for example in data.train[:8]]
    prefixes = [untrained_prefix(base, recipe, seed=seed, texts=texts[seed:]) for seed in range(4)]
    model: Any = base.model
    if kind == PEFT_PREFIX:
        model = BUILDERS[PEFT_PREFIX](base, recipe, data).model.eval()

    def step(batch: dict[str, Tensor]) -> int:
        ids = batch["input_ids"][:, :16].repeat(1, -(-prompt // 16))[:, :prompt]
        rows = {"prefix": prefixes[0], "mixed": [prefixes[row % 4] for row in range(len(ids))]}.get(kind)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": base.tokenizer.pad_token_id}
        with torch.no_grad(), attach(base.model, rows):
            model.generate(**inputs, **options)
        return ids.shape[0] * 32

    return step


def build(spec: Spec, recipe: Recipe, data: PreparedData) -> tuple[Step, list[dict[str, Tensor]]]:
    base = load(recipe)
    own = list(islice(batches(data, recipe, Collator(base.tokenizer.pad_token_id)), 64))
    if spec.method == FLOOR:
        return matmul_floor(base, recipe), own
    if spec.method == GENERATION:
        return generation_step(spec.kind, spec.prompt, base, recipe, data), own
    return training_step(spec.method, base, recipe, data), own


def forget_peak() -> None:
    """Begin the peak of resident memory anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The peak since `forget_peak`."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return peak_memory_bytes()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    recipe = load_recipe(RECIPE, spec.overrides)
    if spec.keeps_memory:
        prepare_processor(recipe.train.threads)
    else:
        torch.set_num_threads(choose_threads(recipe.train.threads))
    torch.manual_seed(0)
    data = pickle.loads(Path(sys.argv[2]).read_bytes())  # written by speed.py a moment ago
    step, own = build(spec, recipe, data)
    for batch in own[:2]:
        step(batch)
    forget_peak()
    tell({"ready": spec.name, "threads": torch.get_num_threads()})
    done = 2
    for line in sys.stdin:
        if line.strip() != "round":
            break
        started, tokens = time.perf_counter(), 0
        for _ in range(spec.steps):
            tokens += step(own[done % len(own)])
            done += 1
        seconds = time.perf_counter() - started
        tell({"seconds": seconds, "tokens": tokens})
    tell({"peak_bytes": peak_bytes()})


def tell(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def to_json(spec: Spec) -> str:
    return json.dumps(asdict(spec))


if __name__ == "__main__":
    main()
