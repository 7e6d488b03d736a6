"""What every benchmark shares: interleaved timing, the machine's facts, one line of JSON.

Both sides of a ratio are timed in turn within one process, so that a machine that slows down slows
both; a figure is a median, and its spread stands beside it.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the least, middle and largest of some measurements, and how many there were."""
    return {
        "min": min(values),
        "median": median(values),
        "max": max(values),
        "repeats": len(values),
    }


def interleaved(
    sides: Mapping[str, Callable[[], float | None]], repeats: int
) -> dict[str, list[float]]:
    """Time every side once a turn, for ``repeats`` turns after one that does not count.

    A side that returns seconds has timed the part that matters itself.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            begun_s = time.perf_counter()
            own_s = side()
            taken_s = time.perf_counter() - begun_s if own_s is None else own_s
            if turn:
                found[name].append(taken_s)
    return found


def peak_rss_bytes() -> int:
    """Return the most memory this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """Return the memory this process holds now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def machine() -> dict[str, Any]:
    """Return what a figure depends on besides the code."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 2),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def publish(name: str, figures: Mapping[str, Any]) -> None:
    """Print the figures as one line of JSON, the last, and keep them in ``results``."""
    line = json.dumps({"benchmark": name, **figures, "machine": machine()})
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(line + "\n", encoding="utf-8")
    print(line)


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
