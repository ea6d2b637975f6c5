"""Time the kernels that quantize, against a copy of as many bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from qat_patch.bench.harness import interleave
from qat_patch.bench.shapes import Shape, inputs

REPEATS = 10
"""Of a quantization, which is so short that its events would be measured."""


def quantize(shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """The kernels that quantize Q and V of a shape, against a copy of as many bytes."""
    if device == "cpu":
        raise SystemExit("bench: quantize: the kernels need a GPU")
    import triton

    from qat_kernels.triton.operands import Codes, Sequences, quantize_rows, quantize_tokens

    x = inputs(shape, device, dtype)[0].detach()
    sequences = Sequences(shape.batch, shape.heads, shape.queries, shape.queries)
    kernels = {"Q, K": partial(quantize_rows, is_k=True), "V": quantize_tokens}
    operand = sequences.all_rows * triton.next_power_of_2(shape.head_dim) * 2
    calls: dict[str, Callable[[], Any]] = {}
    moved = {}
    for name, kernel in kernels.items():
        codes = Codes.empty(sequences, shape.head_dim, along_tokens=name == "V", device=x.device)
        for kind, into in (("", None), (" and codes", codes)):
            calls[name + kind] = partial(repeat, partial(kernel, x, sequences, codes=into))
            moved[name + kind] = x.numel() * x.element_size() + operand + (sum(map(torch.Tensor.numel, codes)) if into else 0)
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
