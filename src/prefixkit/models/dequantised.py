"""A packaged model that travels as a GGUF file: dequantised once, then an ordinary transformers folder in the cache.

Dequantising takes some 15 seconds, so the result is kept as safetensors, in float32 because the dequantised
values do not fit bfloat16 exactly.
"""

import errno
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from prefixkit.errors import ModelError
from prefixkit.files import read_json, write_json
from prefixkit.logs import get_logger
from prefixkit.models.quiet import quiet_transformers
from prefixkit.packages import PackageFile, cache_dir, fetch_package_file

log = get_logger(__name__)

#: Raised when the same file is to be turned into different weights, tokenizer or configuration.
BUILD = 1
MANIFEST = "built.json"


@dataclass(frozen=True)
class PackagedGguf:
    """A base model packaged as one GGUF file."""

    name: str
    title: str
    file: PackageFile

    @property
    def files(self) -> tuple[PackageFile, ...]:
        """The file, as the only one."""
        return (self.file,)

    @property
    def folder(self) -> Path:
        """Where the dequantised model is kept; it may not be there yet."""
        return cache_dir() / "models" / f"{self.name}-{self.file.sha256[:12]}-{BUILD}"

    def is_ready(self) -> bool:
        """Tell whether the folder holds the whole dequantised model."""
        return is_built(self.folder)

    def make(self) -> None:
        """Fetch the file and dequantise it.

        Raises:
            ModelError: the package cannot be fetched, or the model cannot be stored.
        """
        gguf, folder = fetch_package_file(self.file), self.folder
        log.info("dequantising %s (once, about 20 s)", self.name)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".build-") as name:
                built = Path(name) / "model"
                dequantise(gguf, built, title=self.title)
                _publish(built, folder)
        except OSError as problem:
            raise ModelError(_explain_storage(self, problem)) from None


def is_built(folder: Path) -> bool:
    """Tell whether a folder holds a whole dequantised model: every file of its manifest, with its size."""
    try:
        sizes: dict[str, int] = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def dequantise(gguf: Path, folder: Path, *, title: str) -> None:
    """Turn a GGUF file into a transformers folder: float32 safetensors, configuration, tokenizer, template.

    transformers refuses to save what it loaded from GGUF, so the weights move into a fresh model whose
    configuration does not know where they came from.

    Args:
        gguf: the file to read.
        folder: created; written whole, with a manifest of file sizes.
        title: recorded as the model's name.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        values = loaded.config.to_diff_dict()
        values.pop("quantization_config", None)
        config = type(loaded.config).from_dict(values)
        config._name_or_path = title
        with torch.device("meta"):
            fresh = type(loaded)(config)
        # assign=True shares the tensors instead of holding the weights twice.
        fresh.load_state_dict(loaded.state_dict(), assign=True)
        fresh.tie_weights()
        fresh.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    write_json(folder / MANIFEST, sizes)


def _publish(built: Path, folder: Path) -> None:
    """Move a finished build into place; a damaged predecessor goes, a whole one (another process's) stays."""
    for path in built.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    if folder.exists() and not is_built(folder):
        shutil.rmtree(folder)
    try:
        built.rename(folder)
    except OSError as problem:
        if problem.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not is_built(folder):
            raise


def _explain_storage(packaged: PackagedGguf, problem: OSError) -> str:
    """One line for a model that cannot be stored."""
    parent = packaged.folder.parent
    if problem.errno == errno.ENOSPC:
        return f"{packaged.name}: the disk is full; free about 1 GB under {parent}, or set PREFIXKIT_CACHE"
    reason = problem.strerror or type(problem).__name__
    todo = "set PREFIXKIT_CACHE to a folder you can write to"
    return f"{packaged.name}: cannot write to {parent} ({reason}); {todo}"
