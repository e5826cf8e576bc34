"""Times and memory of calls, measured side by side in one process, and the machine that they were measured on."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

# "cpu" is fair where other processes use the same cores; threads that wait for each other count as busy, so let there be one
TIMERS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}

_LEAST, _MOST = 5, 41  # rounds
_SHORT = 0.5  # seconds

Key = TypeVar("Key", bound=Hashable)
Call = Callable[[], object]
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def interleaved(
    calls: Mapping[Key, Call],
    repeats: int | None = None,
    seconds: float = 60.0,
    device: str = "cpu",
    timer: str = "wall",
) -> dict[Key, list[float]]:
    """Times of calls that take turns, in rounds of random order, so that a busy machine slows all of them alike.

    A short call comes twice at each turn, and the second is timed: its weights and its code are then in cache, as where one
    model serves. Models that share their weights with others would else be faster than those with weights of their own.

    Args:
        calls: what to time, by name. Each is called before.
        repeats: the number of rounds. None for as many as `seconds` of wall-clock time allow, 5 to 41.
        seconds: how long to measure.
        device: the device to wait for.
        timer: a key of TIMERS.

    Returns:
        By name, the seconds of each round; the n-th of all names are of the same round.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    now = TIMERS[timer]
    times: dict[Key, list[float]] = {name: [] for name in calls}
    order, generator = list(calls), random.Random(0)

    def turn(name: Key) -> float:
        wait()
        start = now()
        calls[name]()
        wait()
        return now() - start

    for name in order:
        turn(name)
    is_short = {name: turn(name) < _SHORT for name in order}
    begin = time.perf_counter()
    for number in range(repeats or _MOST):
        if repeats is None and number >= _LEAST and time.perf_counter() - begin > seconds:
            break
        generator.shuffle(order)
        for name in order:
            if is_short[name]:
                turn(name)
            times[name].append(turn(name))
    return times


def compare(base: list[float], other: list[float]) -> dict[str, float]:
    """How much faster the second of two interleaved calls is: ratio of medians, and quartiles of the ratio by round."""
    ratios = [one / two for one, two in zip(base, other, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"speedup": statistics.median(base) / statistics.median(other), "low": low, "high": high}


def peak_memory(call: Call, device: str = "cpu") -> float | None:
    """MiB that a call needs beyond what is there before it: weights and libraries are not counted.

    On the CPU it is the high-water mark of the resident set, which Linux can reset; memory that the allocator held is given
    back first.

    Args:
        call: what to run, once.
        device: where it runs.

    Returns:
        The MiB, or None where the system does not tell.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not _RESET.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    _RESET.write_text("5")
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 2**10


def _status(name: str) -> int:
    """A field of the process's status, in KiB."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1])


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the numbers depend on: processor, cores, threads, the load of the last minute, versions."""
    info = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in info.read_text().splitlines()] if info.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name", platform.processor()),
        "instructions": [flag for flag in ("avx2", "avx512f", "amx_bf16") if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
