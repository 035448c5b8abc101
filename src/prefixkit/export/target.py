"""May a folder be written into? Asked before anything slow happens."""

from collections.abc import Collection
from pathlib import Path

from prefixkit.errors import ExportError


def check_target(folder: Path, own: Collection[str], *, overwrite: bool) -> None:
    """Refuse to write over what is there; changes nothing.

    Args:
        folder: where the files are to go.
        own: names of the files that will be written.
        overwrite: whether earlier ones may be replaced; a folder that holds anything else never is.

    Raises:
        ExportError: the folder is a file, holds something else, or exists and `overwrite` was not asked for.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ExportError(f"{folder}: is a file; choose a folder")
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if name not in own]
    if foreign:
        raise ExportError(f"{folder}: holds {foreign[0]}, which is not ours to overwrite; choose another folder")
    if names and not overwrite:
        raise ExportError(f"{folder}: exists already; replace it with --overwrite, or choose another folder")
