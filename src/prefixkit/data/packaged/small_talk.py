"""`small-talk`: what people say to a chat bot, and what it answers."""

import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from prefixkit.data.packaged.dataset import PackagedDataset
from prefixkit.packages import PackageFile

_FOLDER = PurePosixPath("chatterbot_corpus/data/english")
#: Not read: its answers are programs, which cleaning would write into one line.
_PROGRAMS = "coding"
#: Where what follows a conversation's first line are answers to it, one as good as the other, and not a conversation.
_ALTERNATIVES = frozenset({"computers", "emotion"})


def read_talk(path: Path) -> Iterator[dict[str, Any]]:
    """Yield what is said and what is answered, topic by topic.

    A conversation of several turns gives an exchange for every second one of them. Columns: ``input``; ``target``;
    ``messages``, the same exchange as a user's and an assistant's turn; ``topic``, the name of the file it is from.
    """
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            place = PurePosixPath(name)
            if place.suffix != ".yml" or place.parent != _FOLDER or place.stem == _PROGRAMS:
                continue
            for lines in yaml.safe_load(archive.read(name))["conversations"]:
                for said, answer in _exchanges(lines, place.stem):
                    yield {
                        "input": said,
                        "target": answer,
                        "messages": [{"role": "user", "content": said}, {"role": "assistant", "content": answer}],
                        "topic": place.stem,
                    }


def _exchanges(lines: list[str], topic: str) -> Iterator[tuple[str, str]]:
    if topic in _ALTERNATIVES:
        yield from ((lines[0], answer) for answer in lines[1:])
    else:
        yield from list(pairwise(lines))[::2]


SMALL_TALK = PackagedDataset(
    file=PackageFile(
        distribution="chatterbot-corpus",
        version="1.3.3",
        member=None,
        sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        size_bytes=345_706,
        licence="BSD, says the package, which comes without the licence's text; written by its contributors",
        download_bytes=345_706,
    ),
    read=read_talk,
)
"""The English part of ChatterBot's corpus: small talk, questions about a bot, trivia."""
