"""What several commands show: progress on stderr, a table of scores on stdout."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from prefixkit.lab.pages.comparison import MEASURES, format_value
from prefixkit.lab.run.run import Report, Run
from prefixkit.lab.study.claims import judge
from prefixkit.lab.study.results import StudyResult
from prefixkit.lab.sweep.run import Group
from prefixkit.logs import talk
from prefixkit.processes import is_first

#: Measures that are printed, of those that reports have.
_SHOWN = (
    "accuracy", "macro_f1", "entity_f1", "heldout_nll", "heldout_nll_negative", "steering", "bleu", "chrf", "nist",
    "rouge_l", "meteor", "bertscore", "sentiment_accuracy", "fluency_ppl", "repetition", "distinct_2", "self_bleu",
    "novelty",
)  # fmt: skip
#: What stands before a system's keys, and its name.
_SYSTEMS = {
    "majority.": "commonest label", "words.": "bag of words", "head.": "head alone",
    "base.": "base model", "instruction.": "instruction", "": "prefix", "real.": "people",
}  # fmt: skip


class ProgressLines:
    """Progress for a log file: what takes long says every half minute how far it is, and that it is done.

    Args:
        say: takes a line.
        clock: seconds.
    """

    EVERY = 30.0

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._began: dict[str, tuple[float, int]] = {}
        self._said: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int, words: str) -> None:
        """Take note of progress."""
        now = self._clock()
        began, before = self._began.setdefault(what, (now, done))
        is_long, is_due = what in self._said, now - self._said.get(what, began) >= self.EVERY
        if is_due or (done == total and is_long):
            self._said[what] = now
            spent = f"{done - before} in {now - began:.0f} s"
            self._say(f"{what}: {done} of {total}, {spent}{f', {words}' if words else ''}")


def _say(line: str) -> None:
    talk.print(line, highlight=False, markup=False, soft_wrap=True)


def _say_nothing(what: str, done: int, total: int, words: str) -> None:
    """Be one of several processes, of which the first speaks."""


@contextmanager
def progress() -> Iterator[Report]:
    """Yield a function that draws progress bars on stderr, or writes lines now and then where it is no terminal."""
    if not talk.is_terminal or not is_first():
        yield ProgressLines(_say) if is_first() else _say_nothing
        return
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"), console=talk, transient=False,
    )  # fmt: skip
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int, words: str) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total, words=words)
        bar.update(tasks[what], completed=done, total=total, words=words)

    with bar:
        yield report


def print_groups(groups: Sequence[Group], metric: str, folder: Path) -> None:
    """Print what a sweep came to: per combination of settings the mean over seeds and its interval."""
    table = Table(title=str(folder), title_justify="left")
    keys = list(dict.fromkeys(key for group in groups for key, _ in group.settings))
    for heading in (*keys, "seeds", "failed", metric, "95% interval"):
        table.add_column(heading, justify="left" if heading in keys else "right")
    for group in groups:
        settings, interval = dict(group.settings), group.interval
        table.add_row(
            *(settings[key] for key in keys), str(len(group.values)), str(group.failed or ""),
            "" if group.mean is None else f"{group.mean:.4f}",
            "" if interval is None else f"[{interval.low:.4f}, {interval.high:.4f}]",
        )  # fmt: skip
    Console(highlight=False).print(table)


def print_verdicts(result: StudyResult, page: Path) -> None:
    """Print what became of a study's claims, what failed, and where its page is."""
    table = Table(title=result.study.title, title_justify="left")
    for heading in ("claim", "came out", "measured"):
        table.add_column(heading)
    for verdict in judge(result):
        table.add_row(verdict.claim.says, str(verdict.ruling), verdict.why)
    console = Console(highlight=False)
    console.print(table)
    failed = sum(outcome.error is not None for outcome in result.outcomes)
    if failed:
        console.print(f"{failed} of {len(result.outcomes)} runs failed; the page says which and why")
    console.print(f"page: {page}", soft_wrap=True)


def print_scores(run: Run) -> None:
    """Print the comparison of the prefix with everything it was measured beside, and where the report is."""
    table = Table(title=str(run.folder), title_justify="left")
    systems = {key: name for key, name in _SYSTEMS.items() if not key or any(s.startswith(key) for s in run.scores)}
    for heading in ("measure", *systems.values()):
        table.add_column(heading, justify="left" if heading == "measure" else "right")
    for measure in (each for each in MEASURES if each.key in _SHOWN):
        cells = [run.scores.get(f"{system}{measure.key}") for system in systems]
        if any(cell is not None for cell in cells):
            table.add_row(measure.label, *("" if cell is None else format_value(cell, measure.unit) for cell in cells))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"report: {run.report}", soft_wrap=True)
