"""What benchmarks share: the description of the machine, error bounds, timing in turns, and writing results."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

OUTPUT_BOUND, GRADIENT_BOUND = 3e-3, 1e-2
"""Bounds of the relative L2 error against float32 (docs/NUMERICS.md, section 7). What exceeds them is not timed."""
_CYCLES = 4_000_000
"""How long the GPU waits before each call: about 2 ms."""


def machine(device: str, dtype: str) -> dict[str, str]:
    """The hardware and versions that times depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
    about = {"device": name, "torch": torch.__version__, "dtype": dtype}
    if device == "cuda":
        import triton

        about["triton"] = triton.__version__
    return about


def number_of_rounds(text: str) -> int:
    """The argument --rounds, for argparse: times are reported with their quartiles, which one round does not have."""
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2, got {number}")
    return number


def write(results: list[dict[str, Any]], file: Path | None) -> None:
    """Write the results so far as JSON, if a file is given."""
    if file is not None:
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def interleave(calls: dict[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, list[float]]:
    """The seconds of every round; the calls take turns. The first two rounds warm up and do not count.

    On a GPU this is the time between two events around each call. Before the call the L2 cache is emptied, and the GPU waits
    until all launches are queued, as in training. So the CPU's time for launching is not counted.
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
