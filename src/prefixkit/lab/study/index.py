"""The page over all studies: what each asks, and what became of its claims."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefixkit.files import write_text
from prefixkit.lab.pages.render import render_page
from prefixkit.lab.study.claims import Ruling, Verdict, judge
from prefixkit.lab.study.page import PAGE, diverged_share
from prefixkit.lab.study.results import StudyResult, read_results

INDEX = "index.html"


@dataclass(frozen=True)
class Entry:
    """One study on the page."""

    result: StudyResult
    link: str
    verdicts: Sequence[Verdict]


def write_index(folders: Sequence[Path], home: Path) -> Path:
    """Write the page over the studies in some folders, and return its path.

    Args:
        folders: of studies that have results.
        home: where the page goes; links to the studies' pages are relative to it.

    Raises:
        ArtefactError: a folder has no results, or damaged ones.
    """
    entries = []
    for folder in folders:
        result = read_results(folder)
        link = (folder / PAGE).resolve().relative_to(home.resolve()) if _is_inside(folder, home) else None
        entries.append(Entry(result, "" if link is None else link.as_posix(), judge(result)))
    path = home / INDEX
    write_text(path, render_index(entries))
    return path


def render_index(entries: Sequence[Entry]) -> str:
    """Return the page; it needs no network and no scripts."""
    claims = [verdict.ruling for entry in entries for verdict in entry.verdicts]
    shares = [diverged_share(entry.result) for entry in entries]
    return render_page(
        "studies.html",
        entries=entries,
        totals=[(str(ruling), claims.count(ruling)) for ruling in Ruling],
        diverged=sum(diverged for diverged, _ in shares),
        trials=sum(trials for _, trials in shares),
    )


def _is_inside(folder: Path, home: Path) -> bool:
    return folder.resolve().is_relative_to(home.resolve())
