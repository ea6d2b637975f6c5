"""Time the quantization kernels against a copy of the same number of bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from qat_patch.bench.harness import interleave
from qat_patch.bench.shapes import Shape, inputs

REPEATS = 10
"""Calls per measurement: one call is so short that the time of events would dominate."""


def quantize(shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Time the kernels that quantize Q and V of a shape against a copy of the same number of bytes."""
    if device == "cpu":
        raise SystemExit("bench: quantize: the kernels need a GPU")
    import triton

    from qat_kernels.spec import NVFP4Format
    from qat_kernels.triton.operands import Codes, Given, Layout, Sequences, rows_job, together, tokens_job

    x = inputs(shape, device, dtype)[0].detach()
    sequences = Sequences(shape.batch, shape.heads, shape.queries, shape.queries)
    problem = (Layout.of(x), sequences, Given(), NVFP4Format())
    operand = x.new_empty((sequences.all_rows, triton.next_power_of_2(shape.head_dim)), dtype=torch.bfloat16)
    calls: dict[str, Callable[[], Any]] = {}
    moved = {}
    for kind, store in (("", False), (" and codes", True)):
        q, v = (Codes.empty(sequences, shape.head_dim, along_tokens=v, device=x.device) for v in (False, True))
        rows = together(rows_job(*problem, is_k=True, operand=operand.dtype, codes=store))
        tokens = together(tokens_job(*problem, quantized=operand.dtype, codes=store))
        q_codes, v_codes = (q, v) if store else ((None, None), (None, None))
        calls["Q, K" + kind] = partial(repeat, partial(rows, ((x, None, None, None, None, operand, *q_codes, None),)))
        calls["V" + kind] = partial(repeat, partial(tokens, ((x, None, None, None, operand, None, *v_codes),)))
        for name, codes in (("Q, K", q), ("V", v)):
            moved[name + kind] = x.nbytes + operand.nbytes + (sum(part.nbytes for part in codes) if store else 0)
    source, target = (torch.empty(max(moved.values()) // 2, dtype=torch.uint8, device=device) for _ in range(2))
    calls["copy"], moved["copy"] = partial(repeat, partial(target.copy_, source)), 2 * source.numel()
    results = []
    for name, seconds in interleave(calls, device, rounds).items():
        low, median, high = (x / REPEATS for x in statistics.quantiles(seconds, n=4, method="inclusive"))
        print(f"  {name:14} {1e3 * median:9.3f} ms ({1e3 * low:.3f} to {1e3 * high:.3f})  {moved[name] / median / 1e9:7.0f} GB/s")
        results.append({"what": "quantize", "name": name, "seconds": [low, median, high], "bytes": moved[name]})
    return results


def repeat(call: Callable[[], Any]) -> None:
    for _ in range(REPEATS):
        call()
