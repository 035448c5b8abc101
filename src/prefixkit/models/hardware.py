"""What this machine can do: number format, threads, memory, and the record of it that a run keeps."""

import ctypes
import gc
import math
import os
import platform
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from prefixkit import processes
from prefixkit.config import Dtype
from prefixkit.errors import ConfigError, did_you_mean
from prefixkit.logs import get_logger

log = get_logger(__name__)

#: Flags of processors that multiply bfloat16 matrices themselves: AVX-512 and AMX on x86, BF16 on Arm.
NATIVE_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_CPUINFO = Path("/proc/cpuinfo")
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")
#: Numbers of glibc's mallopt, and the variables that set from outside what it sets.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SET_OUTSIDE = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
#: Bytes of the largest tensor whose memory is kept; an older glibc takes no more than the second.
_LARGEST_KEPT = (1 << 30, 1 << 25)
_RECORDED_PACKAGES = ("torch", "transformers", "accelerate", "peft", "scikit-learn", "sacrebleu", "prefixkit")


@dataclass(frozen=True)
class Machine:
    """The machine and the software a result was measured on."""

    cpu: str
    """Model name of the processor."""
    cores: int
    """Cores this process may use."""
    memory_bytes: int
    """Main memory of the machine."""
    python: str
    platform: str
    accelerator: str | None
    """Name of the GPU, None on a CPU."""
    versions: dict[str, str]
    """Versions of the packages that decide results."""


def choose_dtype(dtype: Dtype | str = Dtype.AUTO) -> torch.dtype:
    """Return the number format for the weights; ``auto`` asks the hardware, and says so once.

    Raises:
        ConfigError: the name is no number format prefixkit knows.
    """
    if dtype not in list(Dtype):
        names = [item.value for item in Dtype]
        raise ConfigError(
            f"model.dtype: expected {', '.join(names)}, got {str(dtype)!r}{did_you_mean(str(dtype), names)}"
        )
    if Dtype(dtype) is not Dtype.AUTO:
        chosen: torch.dtype = getattr(torch, Dtype(dtype).value)
        return chosen
    is_native = computes_bfloat16()
    _say_dtype(is_native)
    return torch.bfloat16 if is_native else torch.float32


def computes_bfloat16() -> bool:
    """Tell whether this machine computes in bfloat16 natively.

    torch computes bfloat16 on any processor, but where the instructions are missing it emulates them, slower
    than float32.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(NATIVE_BFLOAT16_FLAGS & _cpu_flags())


@lru_cache(maxsize=2)
def _say_dtype(is_native: bool) -> None:
    """Cached, so that a process says it once."""
    if is_native:
        log.info("weights in bfloat16, which this hardware computes natively")
    else:
        log.info("weights in float32: this hardware has no native bfloat16")


def choose_device() -> torch.device:
    """Return where a base model goes: the first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def finish_computing(device: torch.device) -> None:
    """Wait for what a GPU was asked to compute, which goes on behind the program's back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose_threads(requested: int | None = None) -> int:
    """Return how many threads to compute with.

    The physical cores this process may use, by its affinity and by the quota of its control group: a second
    thread on a core, or a thread without a core, slows matrix products down. Processes of one run share them.
    OMP_NUM_THREADS is a limit too.

    Args:
        requested: taken if given, but never more than that.

    Raises:
        ConfigError: fewer than 1 thread is asked for.
    """
    if requested is not None and requested < 1:
        raise ConfigError(f"train.threads: expected at least 1, got {requested}")
    usable = max(1, usable_cores() // processes.count_here())
    if processes.count_here() == 1 and os.environ.get("OMP_NUM_THREADS", "").isdigit():  # torchrun sets it to 1 unasked
        usable = max(1, min(usable, int(os.environ["OMP_NUM_THREADS"])))
    return usable if requested is None else min(requested, usable)


def prepare_processor(threads: int | None = None) -> None:
    """Set this process up for long computations: its threads, and how memory that is let go is kept.

    glibc gives every larger tensor back to the system and asks for the next one anew, and the system fills that with
    zeros, page by page. Kept instead, it is there for the next tensor; `give_back_memory` still returns it. Where
    MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_ or GLIBC_TUNABLES is set, glibc is left as that has it: so
    MALLOC_TRIM_THRESHOLD_=131072, its own value, turns keeping off.

    Args:
        threads: for `choose_threads`.

    Raises:
        ConfigError: as `choose_threads` does.
    """
    torch.set_num_threads(choose_threads(threads))
    if _has_glibc() and not any(variable in os.environ for variable in _SET_OUTSIDE):
        set_option = ctypes.CDLL(None).mallopt  # 1 where it took the value
        if any(set_option(_M_MMAP_THRESHOLD, size) == 1 for size in _LARGEST_KEPT):
            set_option(_M_TRIM_THRESHOLD, _LARGEST_KEPT[0])


def usable_cores() -> int:
    """Return the number of physical cores this process may keep busy, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [allowed, psutil.cpu_count(logical=False) or allowed]
    quota = cpu_quota()
    if quota is not None:
        limits.append(math.ceil(quota))
    return max(1, min(limits))


def cpu_quota(root: Path = _CGROUP_ROOT, membership: Path = _CGROUP_MEMBERSHIP) -> float | None:
    """Return the cores the control group may use, None without a limit.

    The tightest of the process's own group and all groups above it, in either version of control groups.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    quotas: list[float] = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            read, base = _quota_v2, root
        elif "cpu" in controllers.split(","):
            read, base = (
                _quota_v1,
                next((root / name for name in (controllers, "cpu") if (root / name).is_dir()), root),
            )
        else:
            continue
        parts = Path(group.strip("/")).parts
        # Inside a container the path may be the host's: then only the mount's root exists.
        folders = [base.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
        quotas += [quota for quota in map(read, folders) if quota is not None]
    return min(quotas, default=None)


def _quota_v2(folder: Path) -> float | None:
    """Read ``cpu.max``: the quota, or the word max, and the period."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(folder: Path) -> float | None:
    """Read ``cpu.cfs_quota_us``, -1 for none, and its period."""
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return None if quota < 0 else quota / int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError, ZeroDivisionError):
        return None


def describe_machine() -> Machine:
    """Return what a run records about the machine it ran on."""
    return Machine(
        cpu=_cpu_name(),
        cores=usable_cores(),
        memory_bytes=psutil.virtual_memory().total,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        accelerator=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        versions={name: _version(name) for name in _RECORDED_PACKAGES},
    )


def held_memory_bytes() -> int:
    """Return the memory this process holds now: of the GPU where there is one, else resident."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else int(psutil.Process().memory_info().rss)


def peak_memory_bytes() -> int:
    """Return the most memory this process has held so far: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return int(getattr(psutil.Process().memory_info(), "peak_wset"))  # noqa: B009 - a field of Windows only
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def give_back_memory() -> None:
    """Return memory that was let go to the system, as far as the allocator can (glibc, CUDA); otherwise do nothing."""
    gc.collect()
    torch.cuda.empty_cache()
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> frozenset[str]:
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def _cpuinfo(key: str) -> str:
    """Return the first value of a key in /proc/cpuinfo, empty where there is none."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""
