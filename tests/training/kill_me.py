"""Trains the recipe in argv[1] into the folder argv[2], and dies by SIGKILL when step argv[3] is reached."""

import os
import signal
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

from prefixkit.config import load_recipe  # noqa: E402
from prefixkit.data import prepare  # noqa: E402
from prefixkit.models import load_base_model  # noqa: E402
from prefixkit.prefix import BaseCard, Prefix, PrefixStates  # noqa: E402
from prefixkit.training import train_prefix  # noqa: E402


def measure(states: PrefixStates) -> float:
    """Stand in for a held-out loss: any number that follows from the states alone."""
    return float(sum(site.key.square().mean() for site in states.sites))


def main() -> None:
    recipe, folder, last = load_recipe(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

    def report(step: int, steps: int, words: str) -> None:
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)

    base = load_base_model(recipe.model.base, dtype=recipe.model.dtype)
    data = prepare(recipe.data, base.tokenizer, prefix_tokens=4, context_tokens=base.context_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    outcome = train_prefix(base, data.train, recipe, folder, measure=measure, report=report)
    print(Prefix.from_states(outcome.states, base=BaseCard(id="tiny")).save(folder).card.content_hash)


if __name__ == "__main__":
    main()
