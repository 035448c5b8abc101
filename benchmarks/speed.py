"""Speed and memory beside PEFT: contestants take turns on the same batches; what counts is the ratio in each round.

    python benchmarks/speed.py                         all suites
    python benchmarks/speed.py --suites training       one of them
    python benchmarks/speed.py --rounds 9

Each contestant is a process of its own (`workloads.py`). Exits with 1 where a goal is missed.
"""

import argparse
import json
import pickle
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from contestants import FULL, LORA, PEFT_PREFIX, PEFT_PROJECTED, PREFIXKIT
from prefixkit.config import Recipe, load_recipe
from prefixkit.data import PreparedData
from prefixkit.files import write_json
from prefixkit.lab.run.loading import load_for
from prefixkit.models.hardware import choose_dtype, describe_machine
from workloads import FLOOR, GENERATION, RECIPE, Spec, to_json

RESULTS = Path(__file__).parent / "results"
GIVING_BACK = "giving-back"


@dataclass(frozen=True)
class Goal:
    """A ratio to reach: `over` divided by `under`, of seconds per token or of peak memory."""

    what: str
    measure: str
    over: str
    under: str
    most: float


def _prefixkit(name: str, *overrides: str) -> Spec:
    return Spec(name, PREFIXKIT, overrides=list(overrides))


SUITES: dict[str, list[Spec]] = {
    "training": [
        Spec(PREFIXKIT, PREFIXKIT),
        Spec(GIVING_BACK, PREFIXKIT, keeps_memory=False),
        Spec(PEFT_PREFIX, PEFT_PREFIX),
        Spec(PEFT_PROJECTED, PEFT_PROJECTED),
        Spec(LORA, LORA),
        Spec(FULL, FULL),
        Spec(FLOOR, FLOOR),
    ],
    "length": [_prefixkit(f"{n} tokens", f"prefix.num_virtual_tokens={n}") for n in (10, 20, 50, 100)],
    "depth": [_prefixkit(f"depth {n}", f"prefix.reparam_depth={n}") for n in range(4)],
    "generation": [
        *(Spec(kind, GENERATION, kind, steps=1) for kind in ("base", "prefix", "mixed", PEFT_PREFIX)),
        Spec("longer", GENERATION, "base", steps=1, prompt=Spec.prompt + 20),
    ],
}
GOALS: dict[str, list[Goal]] = {
    "training": [
        Goal("time per token beside PEFT's prefix", "seconds", PREFIXKIT, PEFT_PREFIX, 1 / 3),
        Goal("peak memory beside PEFT's prefix", "memory", PREFIXKIT, PEFT_PREFIX, 0.5),
        Goal("time per token beside the matrix products alone", "seconds", PREFIXKIT, FLOOR, 2.0),
    ],
    "length": [
        Goal("time of 100 virtual tokens beside 10", "seconds", "100 tokens", "10 tokens", 1.2),
        Goal("peak memory of 100 virtual tokens beside 10", "memory", "100 tokens", "10 tokens", 1.1),
    ],
    "depth": [Goal("time of an MLP of depth 3 beside none", "seconds", "depth 3", "depth 0", 1.1)],
    "generation": [
        Goal("time of mixed rows beside one prefix", "seconds", "mixed", "prefix", 1.05),
        Goal("time of a prefix beside a prompt as much longer", "seconds", "prefix", "longer", 1.05),
    ],
}


class Contestant:
    """A process that works when it is asked to."""

    def __init__(self, spec: Spec, data: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("workloads.py")), to_json(spec), str(data)]
        self.spec, self.rounds, self.peak_bytes = spec, list[dict[str, Any]](), 0
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.threads: int = self._hear()["threads"]

    def play(self) -> None:
        """Work for one round."""
        self.rounds.append(self._ask("round"))

    def leave(self) -> None:
        """Say what it took, and end."""
        self.peak_bytes = self._ask("end")["peak_bytes"]
        self._process.wait()

    def stop(self) -> None:
        """End, however it stands."""
        self._process.kill()

    @property
    def times(self) -> list[float]:
        """Seconds per real token, round by round."""
        return [each["seconds"] / each["tokens"] for each in self.rounds]

    def _ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.spec.name}: its process ended with {self._process.wait()}; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def run_suite(name: str, rounds: int, data: Path) -> dict[str, Any]:
    """Let the contestants of a suite take turns; the order turns round from one round to the next."""
    with ExitStack() as stack:
        contestants = []
        for spec in SUITES[name]:
            say(f"{name}: {spec.name} gets ready")
            contestants.append(Contestant(spec, data))
            stack.callback(contestants[-1].stop)
        for turn in range(rounds):
            for contestant in contestants if turn % 2 == 0 else reversed(contestants):
                contestant.play()
            say(f"{name}: round {turn + 1} of {rounds}")
        for contestant in contestants:
            contestant.leave()
    first = contestants[0]
    entries = {
        each.spec.name: {
            "spec": asdict(each.spec),
            "rounds": each.rounds,
            "tokens_per_second": 1 / statistics.median(each.times),
            "peak_bytes": each.peak_bytes,
            "time_beside_first": spread([a / b for a, b in zip(each.times, first.times, strict=True)]),
            "memory_beside_first": each.peak_bytes / first.peak_bytes,
        }
        for each in contestants
    }
    by_name = {each.spec.name: each for each in contestants}
    goals = [check(goal, by_name[goal.over], by_name[goal.under]) for goal in GOALS[name]]
    return {"threads": first.threads, "contestants": entries, "goals": goals}


def prepare_data(recipe: Recipe) -> PreparedData:
    """Read and tokenise once what every contestant is to read."""
    say("preparing the data")
    return load_for(recipe)[1]


def check(goal: Goal, over: Contestant, under: Contestant) -> dict[str, Any]:
    """Return a goal with what came out."""
    if goal.measure == "memory":
        ratio = {"median": over.peak_bytes / under.peak_bytes}
    else:
        ratio = spread([a / b for a, b in zip(over.times, under.times, strict=True)])
    return asdict(goal) | {"ratio": ratio, "is_met": ratio["median"] <= goal.most}


def spread(ratios: list[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def show(result: dict[str, Any]) -> None:
    for name, suite in result["suites"].items():
        print(f"\n{name} ({result['dtype']}, {suite['threads']} threads)")
        for contestant, row in suite["contestants"].items():
            beside = row["time_beside_first"]
            print(
                f"  {contestant:16} {row['tokens_per_second']:8.0f} tokens/s   time {beside['median']:5.2f}x "
                f"[{beside['low']:.2f}, {beside['high']:.2f}]   {row['peak_bytes'] / 1e9:5.2f} GB "
                f"{row['memory_beside_first']:5.2f}x"
            )
        for goal in suite["goals"]:
            mark = "met" if goal["is_met"] else "MISSED"
            print(f"  {mark:6} {goal['what']}: {goal['ratio']['median']:.2f}, at most {goal['most']:.2f}")


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=list(SUITES), default=list(SUITES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed.json")
    arguments = parser.parse_args()
    recipe = load_recipe(RECIPE)
    result: dict[str, Any] = {
        "benchmark": "speed",
        "machine": asdict(describe_machine()),
        "peft": version("peft"),
        "dtype": str(choose_dtype(recipe.model.dtype)).removeprefix("torch."),
        "recipe": recipe.model_dump(mode="json"),
        "rounds": arguments.rounds,
        "suites": {},
    }
    with TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.write_bytes(pickle.dumps(prepare_data(recipe)))
        for name in arguments.suites:
            result["suites"][name] = run_suite(name, arguments.rounds, data)
            write_json(arguments.out, result)
    show(result)
    if not all(goal["is_met"] for suite in result["suites"].values() for goal in suite["goals"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
