"""The machine, its clock and its memory: what all benchmarks share."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe", "interleaved", "peak_bytes", "reset_peak", "resident_bytes", "seconds"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def describe() -> dict[str, Any]:
    """Which machine the figures are from."""
    return {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "system": platform.platform(terse=True),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(contenders: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds of each contender, measured in turn: A B C, A B C, …

    So a machine that gets slower, or is busy for a while, slows all of them. Each runs once before,
    unmeasured.

    Args:
        contenders: Each runs once and returns its own seconds.
    """
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(repeats):
        for name, run in contenders.items():
            taken[name].append(run())
    return {name: statistics.median(times) for name, times in taken.items()}


def reset_peak() -> str:
    """Forget this process's peak of resident memory so far; how it is measured from here on.

    Linux forgets it on request. Elsewhere the peak is that of the whole life of the process, and
    the answer says so. What was freed but not yet given back is given back first (glibc), so that
    no later need hides in it.
    """
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # another C library, or another system
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")
        _status_bytes("VmHWM")
    except (OSError, ValueError):
        return "ru_maxrss over the whole life of the process, loading included"
    return "VmHWM since the model was loaded"


def peak_bytes() -> int:
    """Peak of resident memory since `reset_peak`, or where that is not available, since birth."""
    try:
        return _status_bytes("VmHWM")
    except (OSError, ValueError):
        try:
            import resource
        except ModuleNotFoundError:  # Windows
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Resident memory now; 0 where the system does not report it."""
    try:
        return _status_bytes("VmRSS")
    except (OSError, ValueError):
        return 0


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{_STATUS} has no {field}")
