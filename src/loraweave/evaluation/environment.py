"""Where numbers were made: versions, machine, memory. Nothing here imports torch."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("loraweave", "torch", "transformers", "peft")
_EARLIER = 0.0


def environment() -> dict[str, Any]:
    """What to store beside every measurement: ``versions`` and ``machine``; no host or user names.

    ``versions`` has loraweave, torch, transformers and peft (None if not installed), python and platform; ``machine``
    has ``cpu``, ``cores`` (those this process may use), ``memory_gb``, ``threads`` and ``gpu`` (the last two are None
    unless torch is loaded).
    """
    versions: dict[str, str | None] = {name: _version(name) for name in PACKAGES}
    versions["python"] = platform.python_version()
    versions["platform"] = f"{platform.system()} {platform.machine()}"
    torch = sys.modules.get("torch")
    machine = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "threads": torch.get_num_threads() if torch else None,
        "gpu": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None,
    }
    return {"versions": versions, "machine": machine}


def peak_memory_gb() -> float | None:
    """The most memory this process has held so far, in GB (10^9 bytes); None where the system does not say."""
    latest = _high_water_gb()
    return None if latest is None else max(latest, _EARLIER)


@contextmanager
def peak_memory() -> Iterator[dict[str, float | None]]:
    """What ``peak_memory_gb`` and ``peak_gpu_memory_gb`` are of the block alone; filled in when it ends.

    The first is None where the system cannot forget an earlier peak, which only Linux can.
    """
    global _EARLIER
    found: dict[str, float | None] = {"peak_memory_gb": None, "peak_gpu_memory_gb": None}
    before = peak_memory_gb()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        forgot = True
    except OSError:
        forgot = False
    yield found
    found["peak_memory_gb"] = _high_water_gb() if forgot else None
    found["peak_gpu_memory_gb"] = peak_gpu_memory_gb()
    _EARLIER = max(_EARLIER, before or 0.0)


def _high_water_gb() -> float | None:
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss, which on Linux a process inherits from the one that started it.
        found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024 / 1e9
    try:
        import resource
    except ImportError:  # Windows has no such module.
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def peak_gpu_memory_gb() -> float | None:
    """The most GPU memory torch has held so far, in GB (10^9 bytes); None where no GPU was used."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return float(torch.cuda.max_memory_allocated()) / 1e9


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # A checkout that is not installed, or an absent optional package.
        return getattr(sys.modules.get(package), "__version__", None)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, some systems not these two.
        return None
