"""Launches dQ, dK and dV for Hopper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from qat_kernels.triton import tiles
from qat_kernels.triton.operands import Given, Layout, contiguous_strides
from qat_kernels.triton.precompiled import Launch, Number, Pointer
from qat_kernels.triton.problem import Problem
from qat_kernels.triton.tiles import HopperTile

from .descriptors import blocks_of_queries, numbers_of, rows_of, seen_of
from .grad_key_value import grad_key_value_kernel
from .grad_query import grad_query_kernel
from .pipeline import MULTIPROCESSORS, WARP_GROUP_ROWS

_MOST_SPLITS, _LEAST_TILES = 8, 64
"""Splits of a block, and tiles of a split."""
_TILES_OF_PROLOGUE = 8
"""How many tiles take as long as the start and the end of a program."""
_BLOCK_BYTES = 128 * 2 * 4 * 2
"""Float32 of dK and dV of a block of 128 keys, written and read, for each column."""
_BYTES_OF_TILE = 4_000_000
"""What memory moves in the time of a tile, about a microsecond."""


@dataclass(frozen=True)
class GradQuery:
    """A launch with the tensors of the Triton kernel, in their order; those that this one does not take are None."""

    launch: Launch

    def __call__(
        self, q: Any, k: Any, v: Any, v_kept: Any, key_mask: Any, leftpad: Any, cu_seqlens_q: Any, cu_seqlens_k: Any,
        key_bias: Any, mean_scores: Any, grad_sums: Any, lower: Any, upper: Any, *results: Any,
    ) -> Any:  # fmt: skip
        """Launch it on the current device and stream."""
        sequences = key_mask, leftpad, cu_seqlens_q, cu_seqlens_k, lower, upper
        return self.launch(q, k, v, v_kept, results, sequences)


@dataclass(frozen=True)
class GradKeyValue:
    """Likewise."""

    launch: Launch
    splits: int

    def __call__(
        self, q: Any, k: Any, v: Any, grad_out: Any, v_kept: Any, grad_out_kept: Any, key_mask: Any, leftpad: Any,
        cu_seqlens_q: Any, cu_seqlens_k: Any, key_bias: Any, q_shift: Any, mean_scores: Any, lower: Any, upper: Any, delta: Any,
        stats: Any, *results: Any,
    ) -> Any:  # fmt: skip
        """Launch it on the current device and stream. With splits, results are float32 [splits, ...], to be summed."""
        sequences = key_mask, leftpad, cu_seqlens_q, cu_seqlens_k, lower, upper
        return self.launch(q, k, v, grad_out, v_kept, grad_out_kept, stats, delta, results, sequences)


def grad_query_launch(problem: Problem, tile: HopperTile, grad_out: Layout, given: Given) -> GradQuery:
    """The launch of dQ."""
    queries, keys, seen = problem.query, problem.key, seen_of(problem, given)
    num_blocks = blocks_of_queries(queries.max_seqlen, tile.warp_groups * WARP_GROUP_ROWS.value, seen)
    q = rows_of(queries.all_rows, problem.block_d, WARP_GROUP_ROWS.value)
    kv = rows_of(keys.all_rows, problem.block_d, tile.block_n)
    float32 = Pointer(torch.float32)
    launch = Launch.of(
        grad_query_kernel,
        (queries.batch * queries.num_heads * num_blocks,),
        [
            q, kv, kv, kv if keys.lead else None, (grad_out.pointer, float32, float32, Pointer(grad_out.dtype)),
            _sequences(problem, given),
        ],
        [
            grad_out.strides, contiguous_strides(grad_out.shape)[:3], *_numbers(problem, num_blocks),
            math.copysign(problem.softmax_scale, problem.scale),
        ],
        problem.constants | {"SEEN": seen, "STAGES": tile.num_stages},
        num_warps=4,
    )  # fmt: skip
    return GradQuery(launch)


def grad_key_value_launch(
    problem: Problem, tile: HopperTile, key_shape: torch.Size, dtype: torch.dtype, given: Given
) -> GradKeyValue:
    """The launch of dK and dV, which have this dtype."""
    queries, keys = problem.query, problem.key
    num_blocks = keys.blocks(tile.warp_groups * WARP_GROUP_ROWS.value)
    q = rows_of(queries.all_rows, problem.block_d, tile.block_n)
    kv = rows_of(keys.all_rows, problem.block_d, WARP_GROUP_ROWS.value)
    kept, statistics = keys.lead > 0, numbers_of(2 * queries.all_rows, tile.block_n)
    splits = _splits(problem, given, keys.batch * keys.num_heads * num_blocks, tile.block_n)
    out, out_strides = Pointer(dtype if splits == 1 else torch.float32), contiguous_strides(key_shape)[:3]
    launch = Launch.of(
        grad_key_value_kernel,
        (keys.batch * keys.num_heads * num_blocks * splits,),
        [
            q, kv, kv, q, kv if kept else None, q if kept else None, statistics, statistics, (out, out),
            _sequences(problem, given),
        ],
        [
            (*out_strides, math.prod(key_shape)), *_numbers(problem, num_blocks, splits), problem.softmax_scale,
        ],
        problem.constants | {"SEEN": seen_of(problem, given), "STAGES": tile.num_stages},
        num_warps=4,
    )  # fmt: skip
    return GradKeyValue(launch, splits)


def _splits(problem: Problem, given: Given, blocks: int, tile: int) -> int:
    """Into how many parts the queries of each block of keys are cut, so that few keys fill the GPU.

    Those that take the least time, which is counted in that of a tile: of the programs that a multiprocessor runs one after the
    other, and of the sums over splits. The order of sums depends on it, so it depends on nothing but the problem. It is 1
    where results in parts have not been compared on a GPU (`tiles.is_compared`).
    """
    options = (("key_mask", given.key_mask), ("rotate", problem.spec.rotate))
    compared = tiles.is_compared("splits", problem.head_dim, False, tuple(name for name, there in options if there))
    if problem.causal or problem.query.packed or not compared:
        return 1
    tiles_of_queries = problem.query.blocks(tile) * problem.query.num_heads // problem.key.num_heads
    bytes_of_split = blocks * _BLOCK_BYTES * problem.block_d

    def cost(splits: int) -> float:
        rounds = -(-blocks * splits // MULTIPROCESSORS)
        return rounds * (tiles_of_queries / splits + _TILES_OF_PROLOGUE) + (splits > 1) * splits * bytes_of_split / _BYTES_OF_TILE

    most = max(1, min(_MOST_SPLITS, tiles_of_queries // _LEAST_TILES))
    return min(range(1, most + 1), key=cost)


def _sequences(problem: Problem, given: Given) -> tuple[Pointer | None, ...]:
    """Key mask by slot, leftpad, cu_seqlens of Q and K, and bounds."""
    cu_seqlens = given.pointer(torch.int32, problem.query.packed)
    return *given.key_mask_pointers(), cu_seqlens, cu_seqlens, *given.bound_pointers()


def _numbers(problem: Problem, *num_blocks: int) -> tuple[Number, ...]:
    """From `operand_rows` to the first scale."""
    queries, keys = problem.query, problem.key
    return (queries.rows, keys.rows, queries.all_rows), *problem.sizes, *num_blocks, problem.softmax_scale_log2
