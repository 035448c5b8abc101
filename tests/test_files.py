"""A file is there whole, or it is not there."""

import hashlib
import os
import stat
from pathlib import Path

import pytest

from prefixkit.files import atomic_path, read_json, sha256_file, write_json, write_text


def test_text_and_json_come_back_from_folders_that_did_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "ein ordner" / "日本" / "ä.json"
    write_json(path, {"b": "ü ✓", "a": [1, None, 2.5]})
    assert read_json(path) == {"b": "ü ✓", "a": [1, None, 2.5]}
    assert path.read_text(encoding="utf-8").endswith("}\n")
    assert "ü ✓" in path.read_text(encoding="utf-8")
    write_text(path, "neu")
    assert path.read_text() == "neu"
    assert os.listdir(path.parent) == ["ä.json"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_a_failure_leaves_what_stood_there_and_no_litter(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old"
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_rename_leaves_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_text(tmp_path / "file", "new")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), [float("inf")]])
def test_numbers_that_are_not_json_are_refused_and_the_old_file_stays(value: object, tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == 1


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_the_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()
