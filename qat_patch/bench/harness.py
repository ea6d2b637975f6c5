"""What benchmarks share: what they run on, how far results may be off, taking turns on a clock, and where results go."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

OUTPUT_BOUND, GRADIENT_BOUND = 3e-3, 1e-2
"""Of relative L2 errors against float32 (docs/NUMERICS.md, section 7). Nothing is timed that is beyond."""
_CYCLES = 4_000_000
"""About 2 ms, in which a GPU waits."""


def machine(device: str, dtype: str) -> dict[str, str]:
    """What the times depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
    about = {"device": name, "torch": torch.__version__, "dtype": dtype}
    if device == "cuda":
        import triton

        about["triton"] = triton.__version__
    return about


def write(results: list[dict[str, Any]], file: Path | None) -> None:
    """The results so far as JSON, if there is a file for them."""
    if file is not None:
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def interleave(calls: dict[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, the calls taking turns; the first two rounds warm up and do not count.

    On a GPU the time between two events around each call. Before it the L2 cache is emptied and the GPU kept waiting until all
    launches are queued, as they are in training; what the CPU needs for them is not in these times.
    """
    cache = torch.empty(256 << 20, dtype=torch.uint8, device=device) if device == "cuda" else None
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 2):
        for name, call in calls.items():
            if cache is None:
                began = time.perf_counter()
                call()
                taken = time.perf_counter() - began
            else:
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                cache.zero_()
                torch.cuda._sleep(_CYCLES)
                start.record()
                call()
                stop.record()
                stop.synchronize()
                taken = start.elapsed_time(stop) / 1e3
            if round_number >= 2:
                seconds[name].append(taken)
    return seconds
