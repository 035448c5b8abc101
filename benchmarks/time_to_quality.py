"""How soon prefixkit is where its rivals end, from the curves of `quality_vs_peft.py` and the times of `speed.py`.

    .venv/bin/python benchmarks/time_to_quality.py [result.json]

The curves are those published, of 250 steps on all rows with a validation loss every 50; the time of a step is what
`speed.py` found in alternating runs: published too, or in the file given. A loss counts as reached at the first step
whose validation loss is no higher. Exits with 1 where a goal is missed.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefixkit.files import read_json

ROOT = Path(__file__).parents[1]
QUALITY = ROOT / "docs" / "results" / "all-rows" / "quality_vs_peft.json"
SPEED = ROOT / "benchmarks" / "results" / "speed.json"
#: As both result files call them; see contestants.py.
PREFIXKIT, PEFT_PREFIX, LORA = "prefixkit", "peft-prefix", "lora"
#: PEFT's own examples of prefix tuning train at this rate.
PEFT_RATE = 0.01

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Race:
    """How soon a loss is reached that a rival ends at.

    Attributes:
        what: whose loss.
        loss: on validation rows, nats per token.
        rival: steps until the rival is there.
        own: steps until prefixkit is there; None if it never is.
        time: prefixkit's time beside the rival's; None likewise.
        most: what that may be; None where there is no goal.
    """

    what: str
    loss: float
    rival: int
    own: int | None
    time: float | None
    most: float | None

    @property
    def is_met(self) -> bool:
        """Whether the goal is reached, if there is one."""
        return self.most is None or (self.time is not None and self.time <= self.most)


def races(quality: Json, speed: Json) -> list[Race]:
    """Return all of them.

    Args:
        quality: what `quality_vs_peft.py` found.
        speed: what `speed.py` found.
    """
    peft = [trial for trial in quality["trials"] if trial["method"] == PEFT_PREFIX]
    lora = [trial for trial in quality["trials"] if trial["method"] == LORA]
    plain = [trial for trial in peft if trial["learning_rate"] == PEFT_RATE]
    return [
        _race("PEFT's prefix at its best rate", _best(peft), quality, speed, PEFT_PREFIX, 1 / 3),
        _race(f"PEFT's prefix at {PEFT_RATE}, its examples' rate", _best(plain), quality, speed, PEFT_PREFIX, 1 / 20),
        _race("PEFT's LoRA at its best rate", _best(lora), quality, speed, LORA, None),
    ]


def _race(what: str, there: Json, quality: Json, speed: Json, rival: str, most: float | None) -> Race:
    own = [trial for trial in quality["trials"] if trial["method"] == PREFIXKIT]
    reached = [p["step"] for trial in own for p in trial["curve"] if p["validation_loss"] <= there["validation_loss"]]
    steps = min(reached, default=None)
    contestants = speed["suites"]["training"]["contestants"]
    step = contestants[PREFIXKIT]["time_beside_first"]["median"] / contestants[rival]["time_beside_first"]["median"]
    time = None if steps is None else steps / max(there["step"], 1) * step  # a rival may be best before its first step
    return Race(what, there["validation_loss"], there["step"], steps, time, most)


def _best(trials: list[Json]) -> Json:
    """Return the point with the lowest loss on any of the curves."""
    points: list[Json] = [point for trial in trials for point in trial["curve"]]
    return min(points, key=lambda point: point["validation_loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speed", type=Path, nargs="?", default=SPEED, help="what speed.py wrote")
    found = races(read_json(QUALITY), read_json(parser.parse_args().speed))
    for race in found:
        print(asdict(race))
    sys.exit(not all(race.is_met for race in found))


if __name__ == "__main__":
    main()
