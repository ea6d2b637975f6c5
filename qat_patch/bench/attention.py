"""Check 4-bit attention, then time it beside other implementations."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

import qat_kernels
from qat_kernels import QuantSpec
from qat_kernels.dispatch import why_not
from qat_patch.bench.harness import GRADIENT_BOUND, OUTPUT_BOUND, interleave
from qat_patch.bench.peers import Attention, peers
from qat_patch.bench.shapes import Shape, inputs, packing

Options = dict[str, Any]
TRAINING: dict[str, Options] = {"ours": {"impl": "triton" if torch.cuda.is_available() else "eager"}}
INFERENCE: dict[str, Options] = {
    "fp4": {"impl": "fp4"},
    "fp4, nvfp4_qk": {"impl": "fp4", "spec": QuantSpec(preset="nvfp4_qk")},
    "triton": {"impl": "triton"},
}
"""Ours: the options of `qat_kernels.attention`, by name."""


def inference(shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Attention without gradients, on FP4 units or with emulated ones.

    Raises:
        ValueError: it cannot run here, or its results are wrong.
    """
    problem = why_not("fp4", torch.device(device), dtype, QuantSpec(), False)
    if problem:
        raise ValueError(f"bench: inference: {problem}")
    return attention(shape._replace(forward_only=True), device, dtype, rounds, INFERENCE)


def attention(
    shape: Shape, device: str, dtype: torch.dtype, rounds: int, variants: dict[str, Options] = TRAINING
) -> list[dict[str, Any]]:
    """Time our variants, given as options of `qat_kernels.attention`, and other implementations.

    Raises:
        ValueError: the results of ours are wrong. Then nothing is timed.
    """
    check_all(shape, device, dtype, variants)
    return timed(shape, device, dtype, rounds, variants)


def check_all(shape: Shape, device: str, dtype: torch.dtype, variants: dict[str, Options]) -> None:
    """Call `check` for each of our variants."""
    for name, call in implementations(shape, device, variants).items():
        check(name, call, shape, device, dtype, variants[name].get("spec", QuantSpec()))


def timed(shape: Shape, device: str, dtype: torch.dtype, rounds: int, variants: dict[str, Options]) -> list[dict[str, Any]]:
    """The times of our variants, which must have been checked, and of the others."""
    ours, others = implementations(shape, device, variants), peers(shape, device)
    results = []
    for with_backward in (False,) if shape.forward_only else (False, True):
        seconds_by_name = measure(ours | others, shape, device, dtype, rounds, with_backward)
        for name, seconds in seconds_by_name.items():
            low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
            what = "forward+backward" if with_backward else "forward"
            result: dict[str, Any] = {"what": what, "name": name, "seconds": [low, median, high]}
            line = f"  {what:16} {name:14} {1e3 * median:9.3f} ms ({1e3 * low:.3f} to {1e3 * high:.3f})"
            line += f"  {shape.flops(with_backward) / median / 1e12:7.2f} TFLOP/s"
            if with_backward:
                kept, peak = memory((ours | others)[name], shape, device, dtype)
                result |= {"kept_bytes": kept, "peak_bytes": peak}
                line += f"  keeps {kept / 1e6:.1f} MB" + (f", peak {peak / 1e6:.0f} MB" if peak else "")
            print(line, flush=True)
            results.append(result)
    return results


def implementations(shape: Shape, device: str, variants: dict[str, Options]) -> dict[str, Attention]:
    """Ours, by name."""
    documents = packing(shape.documents(), device) if shape.packed else shape.masking

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        return qat_kernels.attention(q, k, v, causal=shape.causal, **documents, **options)

    return {name: partial(call, **options) for name, options in variants.items()}


def check(name: str, call: Attention, shape: Shape, device: str, dtype: torch.dtype, spec: QuantSpec) -> None:
    """Compare output and gradients of the first key head with float32.

    Raises:
        ValueError: an error exceeds the bounds of docs/NUMERICS.md, section 7.
    """
    *qkv, grad = inputs(shape, device, dtype)
    out = call(*qkv)
    grads = [] if shape.forward_only else torch.autograd.grad(out, qkv, grad)
    group = shape.heads // shape.key_heads
    if shape.packed:  # the last documents: they are short
        start = sum(shape.documents()[:2])
        part = [(slice(start, None), slice(0, n)) for n in (group, 1, 1)]
        exact = [x.detach()[where].float().requires_grad_() for x, where in zip(qkv, part, strict=True)]
        documents = packing(shape.documents()[2:], device)
    else:
        part, documents = [(slice(0, 1), slice(0, n)) for n in (group, 1, 1)], shape.masking
        exact = [x.detach()[where].float().requires_grad_() for x, where in zip(qkv, part, strict=True)]
    expected = qat_kernels.attention(*exact, spec=spec, causal=shape.causal, impl="eager", **documents)
    pairs = [("output", out[part[0]], expected, OUTPUT_BOUND)]
    if grads:
        expected_grads = torch.autograd.grad(expected, exact, grad[part[0]].float())
        pairs += [
            (f"d{x}", a[where], e, GRADIENT_BOUND) for x, a, where, e in zip("qkv", grads, part, expected_grads, strict=True)
        ]
    for what, a, e, bound in pairs:
        error = ((a.float() - e).norm() / e.norm()).item()
        if not error < bound:
            raise ValueError(
                f"bench: {name}: relative L2 of {what}: expected less than {bound:.0e}, got {error:.2e}; nothing timed"
            )
        print(f"  {name}: relative L2 of {what} {error:.2e}")


def measure(
    candidates: dict[str, Attention], shape: Shape, device: str, dtype: torch.dtype, rounds: int, with_backward: bool
) -> dict[str, list[float]]:
    """The seconds of every round; the candidates take turns."""
    *qkv, grad = inputs(shape, device, dtype)
    if not with_backward:
        qkv = [x.detach() for x in qkv]

    def run(call: Attention) -> None:
        out = call(*qkv)
        if with_backward:
            torch.autograd.grad(out, qkv, grad)

    return interleave({name: partial(run, call) for name, call in candidates.items()}, device, rounds)


def memory(call: Attention, shape: Shape, device: str, dtype: torch.dtype) -> tuple[int, int]:
    """The bytes that a forward keeps for its backward (with inputs, if it keeps them), and the peak of both without inputs."""
    *qkv, grad = inputs(shape, device, dtype)
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = call(*qkv)
    torch.autograd.grad(out, qkv, grad)
    return sum(kept.values()), torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
