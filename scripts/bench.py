"""Time 4-bit attention against PyTorch's own, interleaved in one run, after checking that it is right.

python scripts/bench.py --shape 1,12,12,32760,32760,128 --shape 2,40,8,4096,4096,128,causal --json bench.json

A shape is batch, query heads, key heads, queries, keys, head dim, and `causal` if it is. Each of our implementations is first
compared with the float32 reference (docs/NUMERICS.md, section 7); where a bound does not hold nothing is timed. Prints device,
versions, and for each shape the median and the spread (quartiles) of forward and of forward with backward. TFLOP/s count
4 B H Lq Lk D for a forward and 3.5 times that with backward, causal or not.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import qat_kernels

OUTPUT_BOUND, GRADIENT_BOUND = 3e-3, 1e-2
GPU_SHAPES = ("1,12,12,32760,32760,128", "1,40,40,32760,512,128", "2,40,8,4096,4096,128,causal", "4,16,16,8192,8192,64")
"""Wan 2.1 1.3B self-attention at 480p, 14B cross-attention, Qwen3-14B, and head dim 64."""
CPU_SHAPES = ("1,12,12,512,512,128", "2,9,3,256,256,64,causal")


class Shape(NamedTuple):
    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    head_dim: int
    causal: bool

    @classmethod
    def parse(cls, text: str) -> Shape:
        numbers, causal = text.removesuffix(",causal").split(","), text.endswith(",causal")
        if len(numbers) != 6 or not all(number.isdigit() and int(number) for number in numbers):
            raise argparse.ArgumentTypeError(f"expected a shape such as 2,40,8,4096,4096,128,causal, got {text}")
        return cls(*map(int, numbers), causal)

    def flops(self, with_backward: bool) -> float:
        return 4 * self.batch * self.heads * self.queries * self.keys * self.head_dim * (3.5 if with_backward else 1)


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Check, time, print; returns what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    defaults = GPU_SHAPES if device == "cuda" else CPU_SHAPES
    parser.add_argument("--shape", action="append", type=Shape.parse, help=f"default: {' and '.join(defaults)}")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20, help="how often each is timed (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)

    about = machine(device, options.dtype)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    results = []
    for shape in options.shape or [Shape.parse(text) for text in defaults]:
        print(f"\n{shape}")
        ours, peers = implementations(shape, device)
        for name, attention in ours.items():
            check(name, attention, shape, device, dtype)
        for with_backward in (False, True):
            timed = measure(ours | peers, shape, device, dtype, options.rounds, with_backward)
            for name, seconds in timed.items():
                low, median, high = statistics.quantiles(seconds, n=4)
                tflops = shape.flops(with_backward) / median / 1e12
                what = "forward+backward" if with_backward else "forward"
                print(
                    f"  {what:16} {name:14} {1e3 * median:9.3f} ms ({1e3 * low:.3f} to {1e3 * high:.3f})  {tflops:7.2f} TFLOP/s"
                )
                results.append(about | shape._asdict() | {"what": what, "name": name, "seconds": [low, median, high]})
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def machine(device: str, dtype: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
    about = {"device": name, "torch": torch.__version__, "dtype": dtype}
    if device == "cuda":
        import triton

        about["triton"] = triton.__version__
    return about


def implementations(shape: Shape, device: str) -> tuple[dict[str, Attention], dict[str, Attention]]:
    """Ours, and PyTorch's, by name. What cannot run the shape on this device is left out, and said so."""

    def ours(impl: str) -> Attention:
        return lambda q, k, v: qat_kernels.attention(q, k, v, causal=shape.causal, impl=impl)

    def theirs(backend: SDPBackend) -> Attention:
        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=shape.heads != shape.key_heads)

        return attention

    if device == "cpu":
        return {"eager": ours("eager")}, {"sdpa flash": theirs(SDPBackend.FLASH_ATTENTION)}
    peers = {"sdpa flash": theirs(SDPBackend.FLASH_ATTENTION), "sdpa cudnn": theirs(SDPBackend.CUDNN_ATTENTION)}
    for name, attention in list(peers.items()):
        try:
            attention(*inputs(shape._replace(queries=64, keys=64), device, torch.bfloat16)[:3])
        except RuntimeError as error:
            print(f"  {name}: left out: {str(error).splitlines()[0]}")
            del peers[name]
    return {"triton": ours("triton")}, peers


def inputs(shape: Shape, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Unit-Gaussian q, k, v and a gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    query = (shape.batch, shape.heads, shape.queries, shape.head_dim)
    key = (shape.batch, shape.key_heads, shape.keys, shape.head_dim)
    made = [torch.randn(size, generator=generator, device=device, dtype=dtype) for size in (query, key, key, query)]
    return [x.requires_grad_() for x in made[:3]] + made[3:]


def check(name: str, attention: Attention, shape: Shape, device: str, dtype: torch.dtype) -> None:
    """End the program unless output and gradients are within the bounds of docs/NUMERICS.md, section 7."""
    *qkv, grad = inputs(shape, device, dtype)
    out = attention(*qkv)
    exact = [x.detach().float().requires_grad_() for x in qkv]
    expected = qat_kernels.attention(*exact, causal=shape.causal, impl="eager")
    pairs = [("output", out, expected, OUTPUT_BOUND)]
    actual_grads, expected_grads = torch.autograd.grad(out, qkv, grad), torch.autograd.grad(expected, exact, grad.float())
    pairs += [(f"d{x}", a, e, GRADIENT_BOUND) for x, a, e in zip("qkv", actual_grads, expected_grads, strict=True)]
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
    """Seconds of every round, the candidates taking turns; the first two rounds warm up and do not count."""
    *qkv, grad = inputs(shape, device, dtype)
    if not with_backward:
        qkv = [x.detach() for x in qkv]
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(rounds + 2):
        for name, attention in candidates.items():
            synchronize()
            began = time.perf_counter()
            out = attention(*qkv)
            if with_backward:
                torch.autograd.grad(out, qkv, grad)
            synchronize()
            if round_number >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
