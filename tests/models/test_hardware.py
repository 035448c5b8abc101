"""What the machine can do is read from the system, not guessed."""

import ctypes
import platform

import psutil
import pytest
import torch

import processes
from prefixkit.config import Dtype
from prefixkit.errors import ConfigError
from prefixkit.models import hardware
from prefixkit.models.hardware import (
    choose_device,
    choose_dtype,
    choose_threads,
    computes_bfloat16,
    cpu_quota,
    describe_machine,
    peak_memory_bytes,
    usable_cores,
)


@pytest.fixture
def cpu_only(monkeypatch, tmp_path):
    """A machine without a GPU whose /proc/cpuinfo the test writes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "_CPUINFO", tmp_path / "cpuinfo")
    hardware._say_dtype.cache_clear()
    return tmp_path / "cpuinfo"


@pytest.mark.parametrize(
    ("cpuinfo", "native"),
    [
        ("model name\t: A CPU\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("", False),
    ],
)
def test_auto_takes_bfloat16_only_where_it_is_native(cpu_only, cpuinfo, native):
    cpu_only.write_text(cpuinfo)
    assert computes_bfloat16() is native
    assert choose_dtype("auto") == (torch.bfloat16 if native else torch.float32)


def test_system_without_cpuinfo_takes_float32(cpu_only):
    assert choose_dtype() == torch.float32


def test_dtype_is_said_once(cpu_only, caplog):
    with caplog.at_level("INFO", logger="prefixkit"):
        choose_dtype()
        choose_dtype()
        choose_dtype("float64")
    assert caplog.messages == ["weights in float32: this hardware has no native bfloat16"]


@pytest.mark.parametrize("dtype", [item for item in Dtype if item is not Dtype.AUTO])
def test_dtype_asked_for_is_taken(dtype):
    assert choose_dtype(dtype) == choose_dtype(dtype.value) == getattr(torch, dtype.value)


def write_group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_quota_of_control_groups_version_2_is_the_tightest_above(tmp_path):
    membership = tmp_path / "membership"
    membership.write_text("0::/outer/inner\n")
    root = tmp_path / "root"
    write_group(root / "outer" / "inner", cpu__max="max 100000\n")
    assert cpu_quota(root, membership) is None
    write_group(root / "outer", cpu__max="150000 100000\n")
    assert cpu_quota(root, membership) == 1.5
    write_group(root / "outer" / "inner", cpu__max="400000 100000\n")
    assert cpu_quota(root, membership) == 1.5


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu", ""])
def test_quota_of_control_groups_version_1(tmp_path, mount):
    membership = tmp_path / "membership"
    membership.write_text("12:memory:/elsewhere\n4:cpu,cpuacct:/job\n0::/\n")
    root = tmp_path / "root"
    group = root / mount / "job"
    write_group(group, cpu__cfs_quota_us="250000\n", cpu__cfs_period_us="100000\n")
    assert cpu_quota(root, membership) == 2.5
    write_group(group, cpu__cfs_quota_us="-1\n")
    assert cpu_quota(root, membership) is None


def test_quota_of_a_container_is_found_at_the_mount(tmp_path):
    membership = tmp_path / "membership"
    membership.write_text("0::/a/path/of/the/host\n")
    write_group(tmp_path / "root", cpu__max="300000 100000")
    assert cpu_quota(tmp_path / "root", membership) == 3


def test_no_control_groups_no_quota(tmp_path):
    assert cpu_quota(tmp_path, tmp_path / "absent") is None


@pytest.fixture
def cores(monkeypatch):
    def of(*, allowed, physical, quota):
        monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(allowed)), raising=False)
        monkeypatch.setattr(psutil, "cpu_count", lambda logical: physical)
        monkeypatch.setattr(hardware, "cpu_quota", lambda: quota)

    return of


@pytest.mark.parametrize(
    ("allowed", "physical", "quota", "expected"),
    [(16, 8, None, 8), (3, 8, None, 3), (16, 8, 2.5, 3), (16, 8, 0.2, 1), (4, None, None, 4)],
)
def test_threads_are_the_physical_cores_this_process_may_use(cores, allowed, physical, quota, expected, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores(allowed=allowed, physical=physical, quota=quota)
    assert usable_cores() == choose_threads() == choose_threads(99) == expected
    assert choose_threads(1) == 1


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "99"}, 8),
        ({"OMP_NUM_THREADS": "0"}, 1),
        ({"OMP_NUM_THREADS": "4,2"}, 8),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, 4),  # torchrun's own, unasked
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "16"}, 1),
    ],
)
def test_threads_heed_the_environment_and_are_shared_by_processes(cores, environ, expected, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    cores(allowed=16, physical=8, quota=None)
    assert choose_threads() == expected
    assert choose_threads(2) == min(2, expected)


def test_no_threads_is_an_error():
    with pytest.raises(ConfigError, match=r"^train.threads: expected at least 1, got 0$"):
        choose_threads(0)


def test_machine_names_what_decides_results():
    machine = describe_machine()
    assert machine.cpu
    assert 1 <= machine.cores <= psutil.cpu_count()
    assert machine.memory_bytes == psutil.virtual_memory().total
    assert {"torch", "transformers", "peft", "prefixkit"} <= set(machine.versions)
    assert machine.versions["torch"] == torch.__version__


def test_processor_name_and_missing_package(cpu_only):
    cpu_only.write_text("processor : 0\nmodel name\t: Some CPU @ 2 GHz\n\nmodel name\t: another\n")
    assert describe_machine().cpu == "Some CPU @ 2 GHz"
    assert hardware._version("no-such-package-anywhere") == "not installed"


def hold_and_let_go() -> None:
    """Print the most that was held before and after holding more than everything so far."""
    before = peak_memory_bytes()
    torch.ones(before // 4 + 50_000_000)  # four bytes each
    print(before, peak_memory_bytes())


def test_peak_memory_counts_what_was_held_and_let_go():
    before, after = map(int, processes.run(hold_and_let_go).stdout.split())
    assert 50_000_000 < before < after - 100_000_000


@pytest.mark.parametrize(("is_there", "device"), [(True, "cuda"), (False, "cpu")])
def test_a_base_model_goes_to_the_gpu_where_there_is_one(monkeypatch, is_there, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    assert choose_device() == torch.device(device)


def count_pages() -> None:
    """Print how many pages, small ones, tensors of 40 MB are given as they come and go; and again once prepared."""
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
    print(_pages())
    hardware.prepare_processor(1)
    print(_pages())


def _pages() -> int:
    import resource  # not on Windows

    for _ in range(10):  # the first few fill what others have left in between
        torch.zeros(10_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_memory_of_one_tensor_is_kept_for_the_next(monkeypatch):
    for variable in hardware._SET_OUTSIDE:
        monkeypatch.delenv(variable, raising=False)

    def pages(**variables):
        done = processes.run(count_pages, environ=variables)
        assert done.returncode == 0, done.stderr
        return [int(line) for line in done.stdout.split()]

    found, prepared = pages()
    assert found > 90_000  # 40 MB are 9,766 pages
    assert prepared < found / 4
    assert min(pages(MALLOC_TRIM_THRESHOLD_="131072")) > 90_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
@pytest.mark.parametrize(
    ("most", "asked"),
    [
        (1 << 31, [(-3, 1 << 30), (-1, 1 << 30)]),
        (1 << 25, [(-3, 1 << 30), (-3, 1 << 25), (-1, 1 << 30)]),  # an older glibc
        (0, [(-3, 1 << 30), (-3, 1 << 25)]),  # to keep memory and map every tensor anew would be the worst of both
    ],
)
def test_memory_is_kept_as_far_as_glibc_lets_it(monkeypatch, most, asked):
    calls = []

    class Library:
        def mallopt(self, option, size):
            calls.append((option, size))
            return int(option == -1 or size <= most)

    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda _: Library())
    for variable in hardware._SET_OUTSIDE:
        monkeypatch.delenv(variable, raising=False)
    hardware.prepare_processor(1)
    assert calls == asked
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=131072")
    hardware.prepare_processor(1)
    assert calls == asked
