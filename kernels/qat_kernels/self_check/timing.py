"""How fast a kernel is against the Triton forward and PyTorch's own attention, and from which size on it wins."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from qat_kernels.spec import QuantSpec
from qat_kernels.triton import launch as training
from qat_kernels.verdicts import Case

from .problems import Attended

LENGTHS = (256, 1024, 4096, 16384)
"""Queries and keys that are timed, each with each."""
GAIN = 1.05
"""How much faster a kernel has to be to be taken."""
_HEADS, _ROUNDS, _CALLS = 16, 7, 3


class Timed(NamedTuple):
    """Seconds of one call by each implementation; medians of several rounds in turns."""

    queries: int
    keys: int
    kernel: float
    triton: float
    sdpa: float

    @property
    def wins(self) -> bool:
        """Whether the kernel is faster by enough."""
        return self.kernel * GAIN <= self.triton


def measure(forward: Callable[..., Any], case: Case, device: torch.device, lengths: Iterable[int] = LENGTHS) -> list[Timed]:
    """`forward` with every pair of lengths; of causal calls those whose first query sees a key."""
    spec, results = QuantSpec.from_json(case.spec), []
    for queries, keys in product(lengths, repeat=2):
        if case.causal and queries > keys:
            continue
        generator = torch.Generator(device).manual_seed(0)
        q, k, v = (
            torch.randn(1, length, _HEADS, case.head_dim, generator=generator, device=device, dtype=case.dtype).transpose(1, 2)
            for length in (queries, keys, keys)
        )
        call = Attended("timed", q, k, v, spec, case.causal)
        calls: dict[str, Callable[[], Any]] = {
            "kernel": partial(call.run, forward),
            "triton": partial(call.run, training.forward, with_gradient=False),
            "sdpa": partial(scaled_dot_product_attention, q, k, v, is_causal=case.causal),
        }
        results.append(Timed(queries, keys, **_in_turns(calls, device)))
    return results


def wins_from(timed: Iterable[Timed]) -> tuple[int, int] | None:
    """The pair of lengths from which on every larger call that was timed wins: that with most of them; None without any."""
    timed = list(timed)
    best, most = None, 0
    for corner in sorted({(a, b) for a in {t.queries for t in timed} for b in {t.keys for t in timed}}):
        above = [t for t in timed if t.queries >= corner[0] and t.keys >= corner[1]]
        if len(above) > most and all(t.wins for t in above):
            best, most = corner, len(above)
    return best


def _in_turns(calls: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Seconds of a call, launches included: what a model waits for."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(_ROUNDS + 1):  # the first one warms up
        for name, call in calls.items():
            taken = _seconds(call, device)
            if round_number:
                seconds[name].append(taken)
    return {name: statistics.median(each) for name, each in seconds.items()}


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        start.record()
        for _ in range(_CALLS):
            call()
        stop.record()
        stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / _CALLS
