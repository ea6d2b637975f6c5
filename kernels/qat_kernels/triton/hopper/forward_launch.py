"""Launches the forward for Hopper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qat_kernels.triton.operands import Given, Layout
from qat_kernels.triton.precompiled import Launch, Pointer
from qat_kernels.triton.problem import Problem
from qat_kernels.triton.tiles import HopperTile

from .dense_forward import dense_forward_kernel
from .descriptors import blocks_of_queries, rows_of, seen_of, tokens_of
from .forward import attention_forward_kernel
from .pipeline import MULTIPROCESSORS, WARP_GROUP_ROWS


@dataclass(frozen=True)
class Attend:
    """A launch with the tensors of the Triton kernel, in their order; those that this one does not take are None."""

    launch: Launch

    def __call__(
        self, q: Any, k: Any, v: Any, v_kept: Any, key_mask: Any, leftpad: Any, q_dot_k_shift: Any, cu_seqlens_q: Any,
        cu_seqlens_k: Any, key_bias: Any, mean_scores: Any, lower: Any, upper: Any, sinks: Any, out: Any, out_hp: Any, lse: Any,
        stats: Any,
    ) -> Any:  # fmt: skip
        """Launch it on the current device and stream."""
        cu_seqlens = None if cu_seqlens_q is None else (cu_seqlens_q, cu_seqlens_k)
        return self.launch(q, k, v, v_kept, cu_seqlens, (out, out_hp, lse, stats, q_dot_k_shift, lower, upper))


def attend_launch(
    problem: Problem, tile: HopperTile, out_strides: tuple[int, ...], dtype: torch.dtype, given: Given, with_gradient: bool
) -> Attend:
    """For outputs of this dtype and these strides."""
    queries, keys, spec = problem.query, problem.key, problem.spec
    block_m = tile.warp_groups * WARP_GROUP_ROWS.value
    seen = seen_of(problem, given)
    # With a gradient, row statistics of padding are written too.
    num_blocks = blocks_of_queries(queries.blocks(1) if with_gradient else queries.max_seqlen, block_m, seen)
    q = rows_of(queries.all_rows, problem.block_d, WARP_GROUP_ROWS.value)
    kv = rows_of(keys.all_rows, problem.block_d, tile.block_n)
    out, float32, cu_seqlens = Pointer(dtype), Pointer(torch.float32), given.pointer(torch.int32, queries.packed)
    out_hp = out if with_gradient and spec.quantizes_pv else None
    launch = Launch.of(
        attention_forward_kernel,
        (queries.batch * queries.num_heads * num_blocks,),
        [
            q, kv, kv, kv if keys.lead else None, (cu_seqlens, cu_seqlens) if queries.packed else None,
            (out, out_hp, float32, float32 if with_gradient else None, float32 if given.k_shift else None,
             *given.bound_pointers()),
        ],
        [
            out_strides, (queries.rows, keys.rows, queries.all_rows), queries.total, *problem.sizes, num_blocks,
            problem.softmax_scale_log2, problem.scale,
        ],
        {
            "SEEN": seen, "QUANTIZE_PV": spec.quantizes_pv,
            "WARP_GROUPS": tile.warp_groups, "STAGES": tile.num_stages,
        },
        num_warps=4,
    )  # fmt: skip
    return Attend(launch)


@dataclass(frozen=True)
class AttendToAll:
    """Likewise, but it takes Q itself, and where the codes and scales of Q go."""

    launch: Launch

    def __call__(self, q: Any, k: Any, v: Any, codes: Any, scales: Any, out: Any, out_hp: Any, lse: Any, stats: Any) -> Any:
        """Launch it on the current device and stream."""
        return self.launch(q, k, v, out, out_hp, (lse, stats, codes, scales))


def attend_to_all_launch(
    problem: Problem, tile: HopperTile, query: Layout, out_strides: tuple[int, ...], with_gradient: bool
) -> AttendToAll:
    """For Q of this layout, and outputs of these strides."""
    queries, keys = problem.query, problem.key
    block_m = tile.warp_groups * WARP_GROUP_ROWS.value
    num_blocks = -(-(queries.blocks(1) if with_gradient else queries.max_seqlen) // block_m)
    kv = rows_of(keys.all_rows, problem.block_d, tile.block_n)
    out = tokens_of(tuple(query.shape), out_strides, WARP_GROUP_ROWS.value)
    float32, uint8 = Pointer(torch.float32), Pointer(torch.uint8)
    blocks = queries.batch * queries.num_heads * num_blocks
    launch = Launch.of(
        dense_forward_kernel,
        (min(blocks, MULTIPROCESSORS),),
        [
            tokens_of(tuple(query.shape), query.strides, WARP_GROUP_ROWS.value), kv, kv,
            out, out if with_gradient else None,
            (float32, *((float32, uint8, uint8) if with_gradient else (None,) * 3)),
        ],
        [
            queries.total, queries.rows, keys.rows, queries.batch * queries.num_heads, queries.num_heads,
            queries.num_heads // keys.num_heads, queries.max_seqlen, keys.max_seqlen, num_blocks, problem.softmax_scale_log2,
        ],
        {"WARP_GROUPS": tile.warp_groups, "STAGES": tile.num_stages},
        num_warps=4,
    )  # fmt: skip
    return AttendToAll(launch)
