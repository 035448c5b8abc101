"""Which attention is faster while a prefix is trained: sdpa, or the model's own plain matrix products.

    .venv/bin/python benchmarks/attention.py

Forward and backward passes of one layer of the packaged model, by shape and number format, as `model.attention=fastest`
times them before a run.
"""

import argparse
from pathlib import Path

from contestants import conditions
from prefixkit import load_base_model
from prefixkit.files import write_json
from prefixkit.lab.run.attending import choose
from prefixkit.models.attention_speed import attention_seconds
from prefixkit.models.hardware import prepare_processor
from speed import say, spread

RESULTS = Path(__file__).parent / "results"
#: Rows, tokens, virtual tokens.
SHAPES = ((8, 40, 20), (8, 96, 20), (8, 96, 200), (4, 256, 20), (1, 1024, 20))
DTYPES = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "attention.json")
    arguments = parser.parse_args()
    prepare_processor()
    measured = []
    for dtype in DTYPES:
        base = load_base_model("smollm2-135m", dtype=dtype)
        for rows, tokens, virtual_tokens in SHAPES:
            say(f"{dtype}: {rows} rows of {tokens} tokens behind {virtual_tokens}")
            taken = [
                attention_seconds(base.model, rows=rows, tokens=tokens, virtual_tokens=virtual_tokens)
                for _ in range(arguments.rounds)
            ]
            measured.append(
                {
                    "dtype": dtype,
                    "rows": rows,
                    "tokens": tokens,
                    "virtual_tokens": virtual_tokens,
                    "seconds": {name: spread([each[name] for each in taken]) for name in taken[0]},
                    "eager_beside_sdpa": spread([each["eager"] / each["sdpa"] for each in taken]),
                    "chosen": [choose(each) for each in taken],
                }
            )
    result = {"benchmark": "attention", **conditions(base), "rounds": arguments.rounds, "measured": measured}
    del result["dtype"]
    write_json(arguments.out, result)
    for each in measured:
        ratio = each["eager_beside_sdpa"]
        print(f"{each['dtype']:10} {each['rows']} x {each['tokens']} + {each['virtual_tokens']}: {ratio}")


if __name__ == "__main__":
    main()
