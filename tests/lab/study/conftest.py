"""A study on a tiny model, its trials run in this process."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from prefixkit.config import StudyConfig
from prefixkit.errors import PrefixkitError
from prefixkit.lab.run import run
from prefixkit.lab.run.folder import REPORT
from prefixkit.lab.run.run import train_run
from prefixkit.lab.sweep.plan import Trial
from prefixkit.lab.sweep.trial import Result, Runner

WORDS = "the film was wonderful great dull i loved it and story".split()


@pytest.fixture
def overrides(tmp_path: Path, tiny_llama_dir: Path) -> list[str]:
    """What makes any recipe for reviews train in a second."""
    rows = [f"{' '.join(WORDS[(i + k) % 11] for k in range(4 + i % 7))} {i},{'ab'[i % 2]}" for i in range(80)]
    source = tmp_path / "reviews.csv"
    source.write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    return [
        f"model.base={tiny_llama_dir}", "model.dtype=float32", f"data.source={source}", "data.keep_label=a",
        "data.prompt=the film", "data.min_words=1", "data.max_rows=null", "prefix.init.text=it was", "train.threads=1",
        "train.steps=3", "evaluation.samples=2", "evaluation.judge=false",
    ]  # fmt: skip


@pytest.fixture
def study() -> StudyConfig:
    """Two lengths and LoRA, three rates each, two seeds."""
    return StudyConfig.model_validate(
        {
            "name": "mine",
            "title": "Mine",
            "question": "Which?",
            "axis": "virtual tokens",
            "arms": [
                {"name": "{} tokens", "each": [2, 4], "settings": {"prefix.num_virtual_tokens": "{}"}},
                {"name": "lora", "settings": {"method": "lora", "method.rank": 2}},
            ],
            "seeds": 2,
            "claims": [{"source": "s", "says": "2 beat 4", "test": "better", "arms": ["2 tokens", "4 tokens"]}],
        }
    )


@pytest.fixture
def small_study(study: StudyConfig) -> StudyConfig:
    """One length and LoRA, at two rates that go no further."""
    values = study.model_dump(mode="json", exclude={"claims"})
    values["arms"][0]["each"] = [2]
    return StudyConfig.model_validate(values | {"rates": [1.0, 3.0], "extensions": 0})


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study needs no page of each run, which takes longer than training it; test_report.py looks at those."""
    monkeypatch.setattr(run, "write_report", lambda folder: folder / REPORT)


class Counting:
    """A runner in this process that remembers what it ran, and can be told what goes wrong."""

    def __init__(self) -> None:
        self.ran: list[Trial] = []
        self.fails: Callable[[Trial], bool] = lambda trial: False

    def __call__(self, trials: Sequence[Trial], done: Callable[[Result], None]) -> None:
        for trial in trials:
            self.ran.append(trial)
            try:
                if self.fails(trial):
                    raise PrefixkitError("it was told to")
                scores = train_run(trial.recipe, trial.folder, resume=True, report=lambda *_: None).scores
                done(Result(trial, scores))
            except PrefixkitError as error:
                done(Result(trial, {}, str(error)))


@pytest.fixture
def runner() -> Counting:
    """The runner."""
    made: Runner = Counting()
    assert isinstance(made, Counting)
    return made
