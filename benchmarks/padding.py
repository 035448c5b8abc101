"""How much of what a training step reads is padding, with texts of similar length side by side and without.

    .venv/bin/python benchmarks/padding.py

Counted over two epochs of the packaged tasks, in batches as training makes them. It is what packing several texts into
one row could save at most.
"""

import argparse
from pathlib import Path

from prefixkit.config import Recipe, load_recipe
from prefixkit.data import LengthGroupedSampler
from prefixkit.files import write_json
from prefixkit.lab.run.loading import load_for

RESULTS = Path(__file__).parent / "results"
EPOCHS = 2
#: All clear rows of the reviews: the recipe's own learns from a few dozen that are nearly equally long.
TASKS = {
    "positive-reviews": ["data.likeliest=1.0"],
    "positive-reviews, up to 256 tokens": ["data.likeliest=1.0", "data.max_tokens=256"],
    "bbc-headlines": [],
    "small-talk": [],
}


def padding(lengths: list[int], recipe: Recipe, *, grouped: bool) -> float:
    """Return the share of positions that are padding."""
    rows, read = recipe.train.batch_size, 0
    sampler = LengthGroupedSampler(lengths, rows, seed=recipe.train.seed, group_by_length=grouped)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        order = [lengths[row] for row in sampler]
        batches = [order[start : start + rows] for start in range(0, len(order), rows)]
        read += sum(max(batch) * len(batch) for batch in batches)
    return 1 - EPOCHS * sum(lengths) / read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "padding.json")
    arguments = parser.parse_args()
    tasks = {}
    for name, overrides in TASKS.items():
        recipe = load_recipe(name.partition(",")[0], overrides)
        lengths = [example.num_tokens for example in load_for(recipe)[1].train]
        tasks[name] = {
            "texts": len(lengths),
            "tokens": sum(lengths) / len(lengths),
            "grouped": padding(lengths, recipe, grouped=True),
            "shuffled": padding(lengths, recipe, grouped=False),
        }
        print(name, tasks[name])
    write_json(arguments.out, {"benchmark": "padding", "epochs": EPOCHS, "tasks": tasks})


if __name__ == "__main__":
    main()
