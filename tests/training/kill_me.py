"""Trains the recipe in argv[1] into the folder argv[2], and dies by SIGKILL when step argv[3] is reached.

With a step in argv[4], the loss of that step is NaN the first time, so that the run rolls back.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

from prefixkit.config import load_recipe  # noqa: E402
from prefixkit.data import prepare  # noqa: E402
from prefixkit.files import sha256_file  # noqa: E402
from prefixkit.models import load_base_model  # noqa: E402
from prefixkit.prefix import BaseCard, Prefix  # noqa: E402
from prefixkit.training import Trained, checkpoint_folder, checkpoints, read_metrics, train_prefix  # noqa: E402
from prefixkit.training.monitor import Monitor  # noqa: E402
from prefixkit.training.start import build_model  # noqa: E402


def fail_once_at(step_to_fail: int, folder: Path) -> None:
    """Make the monitor see a NaN, once in the whole life of the run."""
    check, mark = Monitor.check, folder / "failed"

    def fail(self: Monitor, step: int, loss: float, grad_norm: float) -> None:
        if step == step_to_fail and not mark.exists():
            mark.touch()
            loss = float("nan")
        check(self, step, loss, grad_norm)

    Monitor.check = fail  # type: ignore[method-assign]


def main() -> None:
    recipe, folder, last = load_recipe(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

    def report(step: int, steps: int, words: str) -> None:
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)

    base = load_base_model(recipe.model.base, dtype=recipe.model.dtype)
    data = prepare(recipe.data, base.tokenizer, prefix_tokens=4, context_tokens=base.context_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) > 4:
        fail_once_at(int(sys.argv[4]), folder)
    model = build_model(base, data.train, recipe, data.classes)
    start = model.materialise()
    model.close()

    def measure(trained: Trained) -> float:
        """Stand in for a held-out loss: the further from the start the better, so that the last step is the best."""
        pairs = [(site.key, first.key) for site, first in zip(trained.states.sites, start.states.sites, strict=True)]
        for delta, first in zip(trained.deltas, start.deltas, strict=True):
            pairs += [(tensor, first.tensors[name]) for name, tensor in delta.tensors.items()]
        return -float(sum((one - other).norm() for one, other in pairs))

    outcome = train_prefix(
        base, data.train, recipe, folder, stream=data.stream, classes=data.classes, measure=measure, report=report
    )
    trained = outcome.trained
    made = Prefix.from_states(trained.states, base=BaseCard(id="tiny"), head=trained.head, deltas=trained.deltas)
    prefix = made.save(folder)
    lines = read_metrics(folder / "metrics.jsonl")
    encoder = checkpoints(checkpoint_folder(folder))[-1] / "encoder.safetensors"
    print(
        json.dumps(
            {
                "prefix": prefix.card.content_hash,
                "encoder": sha256_file(encoder),
                "best_step": outcome.best_step,
                "steps": outcome.steps,
                "rollbacks": outcome.rollbacks,
                "metrics": [{key: line[key] for key in sorted(line) if key != "seconds"} for line in lines],
            }
        )
    )


if __name__ == "__main__":
    main()
