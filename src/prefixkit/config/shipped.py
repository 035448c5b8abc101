"""YAML files that ship with prefixkit, by name, or a person's own, by path."""

from importlib import resources
from pathlib import Path

from prefixkit.errors import ConfigError, did_you_mean


def shipped_names(folder: str) -> list[str]:
    """Return the names of the files in one of the package's folders, without their ending."""
    files = (resources.files("prefixkit") / folder).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def shipped_text(folder: str, name: str) -> str:
    """Return the text of a file in one of the package's folders, by its name without ending."""
    return (resources.files("prefixkit") / folder / f"{name}.yaml").read_text(encoding="utf-8")


def text_of(name_or_path: str, folder: str, known: list[str], *, what: str, listed_by: str) -> str:
    """Return the text of a file, or of a shipped one by its name.

    Args:
        name_or_path: a YAML file, the name of a shipped one, or ``folder/name.yaml``.
        folder: of the package, where shipped ones are.
        known: their names.
        what: they are, such as ``recipe``.
        listed_by: the command that lists them.

    Raises:
        ConfigError: there is no such file and no such name.
    """
    path = Path(name_or_path)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: not a UTF-8 text file; a {what} is YAML") from None
    name = path.name.removesuffix(".yaml")
    if name in known and path.parent.name in ("", folder):
        return shipped_text(folder, name)
    hint = did_you_mean(name, known)
    raise ConfigError(f"{name_or_path}: no such {what} file{hint or f'; see `{listed_by}`'}")
