"""Time 4-bit attention against PyTorch's own, interleaved in one run, after checking that it is right.

python scripts/bench.py attention --json attention.json
python scripts/bench.py attention --shape 1,12,12,32760,32760,128 --shape 2,40,8,4096,4096,128,causal
python scripts/bench.py inference --json inference.json
python scripts/bench.py quantize
python scripts/bench.py report attention.json --png attention.png

A shape is batch, query heads, key heads, queries, keys, head dim, and `causal`, `packed` or `forward` (without a backward) if it
is so; `packed` cuts the batch's tokens into documents of uneven lengths. Each of our implementations is first compared with the
float32 reference on a part of the very problem that is timed (docs/NUMERICS.md, section 7); where a bound does not hold nothing
is timed. Prints device, versions, and for each shape the median and the spread (quartiles) of forward and of forward with
backward, the bytes that a forward keeps for its backward, and the peak of both. TFLOP/s count 4 B H Lq Lk D for a forward and
3.5 times that with backward, causal or not. SageAttention and FlashInfer join where they are installed.

`inference` times what can run without gradients: the kernel for FP4 units, emulated where there are none, with P and V in NVFP4
and in BF16, and the training kernel; each quantizes its inputs first, in the time that is shown.

The JSON is written after every shape. `report` makes a table in Markdown from it, and a picture; from bench_decode.py's too.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import qat_kernels
from bench_peers import Attention, peers
from bench_shapes import CPU_SHAPES, FIGURE_5_SHAPES, GPU_SHAPES, INFERENCE_SHAPES, Shape, inputs, packing
from qat_kernels import QuantSpec
from qat_kernels.explain import why_not

OUTPUT_BOUND, GRADIENT_BOUND = 3e-3, 1e-2
REPEATS = 10
"""Of a quantization, which is so short that its events would be measured."""
_CYCLES = 4_000_000
"""About 2 ms, in which a GPU waits."""
Options = dict[str, Any]
TRAINING = {"ours": {"impl": "triton" if torch.cuda.is_available() else "eager"}}
INFERENCE = {"fp4": {"impl": "fp4"}, "fp4, pv=bf16": {"impl": "fp4", "spec": QuantSpec(pv="bf16")}, "triton": {"impl": "triton"}}
"""Ours: the options of `qat_kernels.attention`, by name."""


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Check, time, print; returns what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, text in (
        ("attention", "time attention, forward and backward"),
        ("inference", "time attention without gradients"),
        ("quantize", "time the quantization kernels against a copy"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--shape", action="append", type=Shape.parse, help="default: those of the published models")
        command.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
        command.add_argument("--rounds", type=int, default=20, help="how often each is timed (default: 20)")
        command.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
        if name == "attention":
            command.add_argument("--figure-5", action="store_true", help="the grid of the paper's figure 5 instead")
    command = commands.add_parser("report", help="a table and a picture of earlier results")
    command.add_argument("file", type=Path)
    command.add_argument("--png", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.command == "report":
        from bench_report import report

        results = json.loads(options.file.read_text(encoding="utf-8"))
        print(report(results, options.png))
        return results
    about = machine(device, options.dtype)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    defaults = CPU_SHAPES if device == "cpu" else FIGURE_5_SHAPES if getattr(options, "figure_5", False) else GPU_SHAPES
    if options.command == "inference":
        defaults = INFERENCE_SHAPES
    measured = {"attention": attention, "inference": inference, "quantize": quantize}[options.command]
    dtype = getattr(torch, options.dtype)
    results = []
    for shape in options.shape or [Shape.parse(text) for text in defaults]:
        print(f"\n{shape}", flush=True)
        results += [about | shape._asdict() | each for each in measured(shape, device, dtype, options.rounds)]
        write(results, options.json)
    return results


def write(results: list[dict[str, Any]], file: Path | None) -> None:
    if file is not None:
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def machine(device: str, dtype: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
    about = {"device": name, "torch": torch.__version__, "dtype": dtype}
    if device == "cuda":
        import triton

        about["triton"] = triton.__version__
    return about


def inference(shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Attention without gradients, on FP4 units or emulating them."""
    problem = why_not("fp4", torch.device(device), dtype, False)
    if problem:
        raise SystemExit(f"bench: inference: {problem}")
    return attention(shape._replace(forward_only=True), device, dtype, rounds, INFERENCE)


def attention(
    shape: Shape, device: str, dtype: torch.dtype, rounds: int, variants: dict[str, Options] = TRAINING
) -> list[dict[str, Any]]:
    """Ours, by the options of `qat_kernels.attention`, and others'."""
    ours, others = implementations(shape, device, variants), peers(shape, device)
    for name, call in ours.items():
        check(name, call, shape, device, dtype, variants[name].get("spec", QuantSpec()))
    results = []
    for with_backward in (False,) if shape.forward_only else (False, True):
        timed = measure(ours | others, shape, device, dtype, rounds, with_backward)
        for name, seconds in timed.items():
            low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
            what = "forward+backward" if with_backward else "forward"
            result = {"what": what, "name": name, "seconds": [low, median, high]}
            line = f"  {what:16} {name:14} {1e3 * median:9.3f} ms ({1e3 * low:.3f} to {1e3 * high:.3f})"
            line += f"  {shape.flops(with_backward) / median / 1e12:7.2f} TFLOP/s"
            if with_backward:
                kept, peak = memory((ours | others)[name], shape, device, dtype)
                result |= {"kept_bytes": kept, "peak_bytes": peak}
                line += f"  keeps {kept / 1e6:.1f} MB" + (f", peak {peak / 1e6:.0f} MB" if peak else "")
            print(line, flush=True)
            results.append(result)
    return results


def quantize(shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """The kernels that quantize Q and V of a shape, against a copy of as many bytes."""
    if device == "cpu":
        raise SystemExit("bench: quantize: the kernels need a GPU")
    from qat_kernels import _layout, _quantize

    x = inputs(shape, device, dtype)[0].detach()
    sequences = _layout.Sequences(shape.batch, shape.heads, shape.queries, shape.queries)
    calls, moved = {}, {}
    for name, tokens in (("Q, K", False), ("V", True)):
        kernel = _quantize.quantize_tokens if tokens else _quantize.quantize_rows
        options = {} if tokens else {"keys": True}
        shapes = _quantize.Codes.shapes(sequences, shape.head_dim, tokens=tokens)
        codes = _quantize.Codes(*(torch.empty(size, dtype=torch.uint8, device=device) for size in shapes))
        for kind, into in (("", None), (" and codes", codes)):
            calls[name + kind] = partial(repeat, partial(kernel, x, sequences, codes=into, **options))
            operand = sequences.all_rows * _quantize.block_of(shape.head_dim) * 2
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


def implementations(shape: Shape, device: str, variants: dict[str, Options]) -> dict[str, Attention]:
    """Ours, by name."""
    documents = packing(shape.documents(), device) if shape.packed else {}

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        return qat_kernels.attention(q, k, v, causal=shape.causal, **documents, **options)

    return {name: partial(call, **options) for name, options in variants.items()}


def check(name: str, call: Attention, shape: Shape, device: str, dtype: torch.dtype, spec: QuantSpec) -> None:
    """End the program unless output and gradients of the first key head are within the bounds of docs/NUMERICS.md, section 7."""
    *qkv, grad = inputs(shape, device, dtype)
    out = call(*qkv)
    grads = [] if shape.forward_only else torch.autograd.grad(out, qkv, grad)
    group = shape.heads // shape.key_heads
    if shape.packed:  # the last documents, which are short
        start = sum(shape.documents()[:2])
        part = [(slice(start, None), slice(0, n)) for n in (group, 1, 1)]
        exact = [x.detach()[where].float().requires_grad_() for x, where in zip(qkv, part, strict=True)]
        documents = packing(shape.documents()[2:], device)
    else:
        part, documents = [(slice(0, 1), slice(0, n)) for n in (group, 1, 1)], {}
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
            raise SystemExit(
                f"bench: {name}: relative L2 of {what}: expected less than {bound:.0e}, got {error:.2e}; nothing timed"
            )
        print(f"  {name}: relative L2 of {what} {error:.2e}")


def measure(
    candidates: dict[str, Attention], shape: Shape, device: str, dtype: torch.dtype, rounds: int, with_backward: bool
) -> dict[str, list[float]]:
    """Seconds of every round, the candidates taking turns."""
    *qkv, grad = inputs(shape, device, dtype)
    if not with_backward:
        qkv = [x.detach() for x in qkv]

    def run(call: Attention) -> None:
        out = call(*qkv)
        if with_backward:
            torch.autograd.grad(out, qkv, grad)

    return interleave({name: lambda call=call: run(call) for name, call in candidates.items()}, device, rounds)


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


def memory(call: Attention, shape: Shape, device: str, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a forward keeps for its backward, inputs included if it keeps these; and the peak of both beside all inputs."""
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


if __name__ == "__main__":
    main()
