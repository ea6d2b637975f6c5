"""Time every tile of a list for each Triton kernel. The choices in qat_kernels.triton.tiles come from this.

python -m scripts.bench.tune --shape 1,12,12,32760,32760,128 --shape 2,40,8,4096,4096,128,causal

Candidates are compiled by many processes at once, then timed one after the other, each kernel by itself, in the middle of a whole
forward and backward. Prints the median of each, the fastest first, and as JSON with --json. A shape is as in scripts.bench.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import statistics
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from qat_kernels import QuantSpec
from qat_kernels.mask import Mask
from qat_kernels.triton import tiles
from qat_kernels.triton.precompiled import Grid, PrecompiledKernel
from qat_patch.bench.shapes import Shape, inputs
from scripts.arguments import new_parser

KERNELS = {
    "attention_forward_kernel": "forward",
    "grad_query_kernel": "grad_query",
    "grad_key_value_kernel": "grad_key_value",
}
CANDIDATES = {
    "forward": [(64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2)],
    "grad_query": [(64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3)],
    "grad_key_value": [(32, 64, 4, 4), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 3), (128, 64, 4, 2), (128, 128, 8, 1)],
}
"""(queries, keys, warps, stages)."""


def main() -> None:
    parser = new_parser("scripts.bench.tune", __doc__)
    parser.add_argument("--shape", action="append", type=Shape.parse, required=True)
    parser.add_argument("--kernel", choices=CANDIDATES, action="append", help="default: all")
    parser.add_argument("--no-gradient", action="store_true", help="only the forward, without O'")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    results = []
    for shape in options.shape:
        names = ["forward"] if options.no_gradient else options.kernel or list(CANDIDATES)
        times = tune(shape, {name: CANDIDATES[name] for name in names}, not options.no_gradient, options.rounds)
        for name, by_tile in times.items():
            for tile, seconds in sorted(by_tile.items(), key=lambda pair: pair[1]):
                print(f"{shape} {name}{' without gradient' if options.no_gradient else ''} {tile}: {1e3 * seconds:.3f} ms")
                results.append(
                    shape._asdict() | {"kernel": name, "gradient": not options.no_gradient, "tile": tile, "s": seconds}
                )
    if options.json is not None:
        options.json.write_text(json.dumps(results) + "\n", encoding="utf-8")


def tune(
    shape: Shape, candidates: dict[str, list[tuple]], with_gradient: bool, rounds: int
) -> dict[str, dict[tuple[int, ...], float]]:
    """The median seconds by kernel and tile. Tiles that do not fit on the GPU are left out."""
    # Triton compiles the same code for this short problem, because its sizes are divisible by the same powers of two.
    small = shape._replace(queries=112 + shape.queries % 16, keys=112 + shape.keys % 16)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {
            (name, tile): pool.submit(run, small, {name: tile}, with_gradient, 1)
            for name in candidates
            for tile in candidates[name]
        }
        fitting = defaultdict(list)
        for (name, tile), future in futures.items():
            if name in future.result():
                fitting[name].append(tile)
    seconds: dict[str, dict[tuple[int, ...], float]] = defaultdict(dict)
    for chosen in itertools.zip_longest(*fitting.values()):
        tried = {name: tile for name, tile in zip(fitting, chosen, strict=True) if tile is not None}
        measured = run(shape, tried, with_gradient, rounds)
        for name, tile in tried.items():
            if name in measured:
                seconds[name][tile] = measured[name]
    return seconds


def run(shape: Shape, tried: dict[str, tuple[int, ...]], with_gradient: bool, rounds: int) -> dict[str, float]:
    """The median seconds of each kernel; empty if one of them needs more than the GPU has."""
    import triton

    from qat_kernels.triton import backward_launch, forward_launch, launch

    for each in (forward_launch, backward_launch):
        each._plan.cache_clear()  # plans are kept by shape
    q, k, v, grad = (x.detach() for x in inputs(shape, "cuda", torch.bfloat16))
    options = {"spec": QuantSpec(), "mask": Mask(causal=shape.causal), "scale": shape.head_dim**-0.5}
    chosen = tiles.choose(90, shape.head_dim, shape.causal)._replace(**{name: tiles.Tile(*tile) for name, tile in tried.items()})
    seconds = defaultdict(list)
    with mock.patch.object(tiles, "choose", lambda *_: chosen), timed(seconds):
        for _ in range(rounds + 1):
            try:
                result = launch.forward(q, k, v, None, None, with_gradient=with_gradient, **options)
                if with_gradient and set(tried) != {"forward"}:
                    saved = (v if shape.causal else None, result.out_hp, result.stats, result.codes)
                    launch.backward(grad, *saved, None, key_shape=k.shape, **options)
            except triton.runtime.errors.OutOfResources:
                return {}
            except RuntimeError as error:
                print(tried, str(error)[:300], flush=True)
                return {}
            torch.cuda.synchronize()
    return {
        name: statistics.median(start.elapsed_time(stop) / 1e3 for start, stop in seconds[name][1:] or seconds[name])
        for name in tried
        if seconds[name]
    }


@contextmanager
def timed(events: dict[str, list]) -> Iterator[None]:
    """Inside, each launch of an attention kernel records a pair of events."""
    launch = PrecompiledKernel.__call__

    def timed_launch(self: PrecompiledKernel, grid: Grid, *arguments: Any) -> Any:
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        kernel = launch(self, grid, *arguments)
        pair[1].record()
        if kernel.name in KERNELS:
            events[KERNELS[kernel.name]].append(pair)
        return kernel

    with mock.patch.object(PrecompiledKernel, "__call__", timed_launch):
        yield


if __name__ == "__main__":
    main()
