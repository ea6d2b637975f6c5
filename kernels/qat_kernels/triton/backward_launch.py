"""The backward of docs/NUMERICS.md, section 5, as Triton kernels: planned once, as in forward_launch.py."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from qat_kernels import smoothing
from qat_kernels.mask import Bounds, Mask
from qat_kernels.reference import LOG2_E
from qat_kernels.spec import SMOOTH_BLOCK, QuantSpec
from qat_kernels.varlen import Packing

from . import tiles
from .backward import grad_key_value_kernel, grad_query_kernel, preprocess_kernel
from .device import arch_of, on_device
from .layout import PAD
from .operands import (
    PLANS,
    Given,
    Layout,
    Sequences,
    allowed_keys,
    contiguous_strides,
    given_tensors,
    operand_dtype,
    tokens_launch,
    unpack_launch,
)
from .precompiled import Launch, Pointer, Tiles, parts, starts
from .problem import PackedSizes, Problem, is_empty


class _Plan(NamedTuple):
    """All of a backward but its tensors."""

    queries: Sequences
    keys: Sequences
    tiles: tiles.Tiles
    codes: list[int]
    """Where codes and scales of Q, K and V begin."""
    operand: torch.dtype
    operands: list[int]
    """Where each begins in the memory that they share: Q, K, V, dO with the factor of its rows, and where groups are kept dO and,
    if V is quantized, V as they are."""
    operands_size: int
    unpack_query: Launch
    unpack_key: Launch
    make_value: Launch
    """Unpacks V, or where it is read again quantizes it."""
    quantizes_value: bool
    two_values: bool
    """Whether V is needed quantized, and as it is for the kept groups."""
    preprocess: Launch
    grad_query: Launch
    grad_key_value: Launch
    softmax_scale: float


@lru_cache(PLANS)
def _plan(
    device: torch.device,
    chosen: tiles.Tiles,
    grad_out: Layout,
    out_hp: Layout,
    value: Layout | None,
    key_shape: torch.Size,
    packed: PackedSizes | None,
    given: Given,
    spec: QuantSpec,
    mask: Mask,
    scale: float,
    softcap: float | None,
) -> _Plan:
    problem = Problem.of(grad_out.shape, key_shape, packed, spec=spec, mask=mask, scale=scale, softcap=softcap)
    queries, keys, operand = problem.query, problem.key, operand_dtype(grad_out.dtype)
    kept, quantizes_value, sage = keys.lead > 0, spec.formats.value is not None, spec.formats.smooth is not None
    constants = {**problem.constants, "HAS_KEY_MASK": given.key_mask, "STORE_GRAD_OUT": kept}
    float32, gradient = Pointer(torch.float32), Pointer(grad_out.dtype)
    mean_scores, cu_seqlens = float32 if sage else None, given.pointer(torch.int32, packed is not None)
    block_m = max(16, 2048 // problem.block_d)
    num_blocks = queries.blocks(block_m)
    preprocess = Launch.of(
        preprocess_kernel,
        (queries.batch * queries.num_heads * num_blocks,),
        [
            grad_out.pointer, out_hp.pointer, float32, cu_seqlens, Pointer(operand), Pointer(operand) if kept else None, float32,
        ],
        [
            *grad_out.strides, *out_hp.strides,
            queries.num_heads, queries.max_seqlen, num_blocks, queries.rows, queries.all_rows,
        ],
        constants | {"BLOCK_M": block_m},
        num_warps=4,
    )  # fmt: skip

    operand_q, operand_k = (queries.all_rows, problem.block_d), (keys.all_rows, problem.block_d)
    two_values = quantizes_value and kept

    def numbers(shape: torch.Size, num_blocks: int, softmax_scale: float) -> list[int | float]:
        return [
            *contiguous_strides(shape)[:3], keys.rows if given.key_mask else 0, *problem.sizes, num_blocks,
            queries.rows, keys.rows, queries.all_rows, problem.softmax_scale_log2, softmax_scale,
        ]  # fmt: skip

    tile = chosen.grad_query
    key_tiles = Tiles(operand, operand_k, tile.block_n)
    num_blocks = queries.blocks(tile.block_m)
    grad_query = Launch.of(
        grad_query_kernel,
        (queries.batch * queries.num_heads * num_blocks,),
        [
            Tiles(operand, operand_q, tile.block_m), key_tiles, key_tiles, key_tiles if two_values else None,
            *given.key_mask_pointers(), cu_seqlens, cu_seqlens,
            mean_scores, float32 if sage else None, *given.bound_pointers(), grad_out.pointer, float32, float32, gradient,
        ],
        [
            given.bounds_stride, *grad_out.strides,
            *numbers(grad_out.shape, num_blocks, math.copysign(problem.softmax_scale, scale)),
        ],
        constants | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    tile = chosen.grad_key_value
    query_tiles, key_tiles = Tiles(operand, operand_q, tile.block_m), Tiles(operand, operand_k, tile.block_n)
    # Where groups are kept, the first block ends with the sink group, which ends PAD slots.
    num_blocks = keys.blocks(tile.block_n) - (PAD // tile.block_n - 1 if kept else 0)
    grad_key_value = Launch.of(
        grad_key_value_kernel,
        (keys.batch * keys.num_heads * num_blocks,),
        [
            query_tiles, key_tiles, key_tiles, query_tiles, key_tiles if two_values else None, query_tiles if kept else None,
            *given.key_mask_pointers(), cu_seqlens, cu_seqlens,
            mean_scores, *given.bound_pointers(), float32, float32, gradient, gradient,
        ],
        [given.bounds_stride, *numbers(key_shape, num_blocks, problem.softmax_scale)],
        constants | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if value is None:
        make_value = unpack_launch(keys, problem.head_dim, operand, along_tokens=True)
    else:
        make_value = tokens_launch(
            value, keys, given, spec.formats.value,
            quantized=operand if quantizes_value else None, unquantized=operand if kept or not quantizes_value else None,
        )  # fmt: skip
    shapes = [operand_q, operand_k, operand_k, operand_q, *[operand_q] * kept, *[operand_k] * two_values]
    return _Plan(
        queries, keys, chosen, starts(problem.code_sizes())[0],
        operand, *starts([math.prod(shape) for shape in shapes]),
        unpack_launch(queries, problem.head_dim, operand, along_tokens=False),
        unpack_launch(keys, problem.head_dim, operand, along_tokens=False),
        make_value, quantizes_value, two_values, preprocess, grad_query, grad_key_value, problem.softmax_scale,
    )  # fmt: skip


def backward(
    grad_out: torch.Tensor,
    value: torch.Tensor | None,
    out_hp: torch.Tensor,
    stats: torch.Tensor,
    codes: torch.Tensor,
    key_mask: torch.Tensor | None,
    packing: Packing | None = None,
    *,
    key_shape: torch.Size,
    spec: QuantSpec,
    mask: Mask,
    scale: float,
    bounds: Bounds | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    query: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """docs/NUMERICS.md, section 5: dQ, dK, dV, contiguous, in the dtype of dO, and that of the sinks, if there are some.

    Args:
        value: V where it is read as it is (`QuantSpec.reads_value`), else None.
        query, key: Q and K where they are (`QuantSpec.reads_query`), else None.
        out_hp: O', or O with BF16 PV.
        stats, codes: of `forward`.
    """
    device, dtype, packed = grad_out.device, grad_out.dtype, PackedSizes.of(packing)
    grad_query = torch.empty(grad_out.shape, dtype=dtype, device=device)
    # With a mask, keys that no query may see are not visited.
    new = torch.empty if key_mask is None else torch.zeros
    grad_key, grad_value = (new(key_shape, dtype=dtype, device=device) for _ in range(2))
    grad_sinks = None if sinks is None else torch.zeros_like(sinks)
    if is_empty(grad_out.shape, key_shape, packed):
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_(), grad_sinks
    with on_device(device):
        mean_scores = grad_sums = None
        if spec.formats.smooth is not None:
            assert query is not None and key is not None, "Q and K are read again"
            smoothed = smoothing.smooth(query, key)
            mean_scores = smoothed.scores
        given, _, lower, upper, _ = given_tensors(key_mask, None, packing, bounds, None)
        chosen = tiles.choose(arch_of(device), grad_out.shape[-1], mask.hides_keys, tiles.variants(mask, softcap))
        plan = _plan(
            device, chosen, Layout.of(grad_out), Layout.of(out_hp), None if value is None else Layout.of(value), key_shape,
            packed, given, spec, mask, scale, softcap,
        )  # fmt: skip
        side = plan.queries
        operands = torch.empty(plan.operands_size, dtype=plan.operand, device=device)
        q, k, v, scaled_grad_out, *others = parts(operands, plan.operands)
        grad_out_operand, v_kept, *_ = *others, None, None
        # What is summed for the sinks has gaps between packed sequences, which no kernel writes.
        delta = torch.empty_like(stats) if sinks is None else torch.zeros_like(stats)
        cu_seqlens_q, cu_seqlens_k, *_ = packing or (None, None)
        key_mask, leftpad = allowed_keys(key_mask, plan.keys)
        q_codes, q_scales, k_codes, k_scales, *v_codes = parts(codes, plan.codes)
        plan.unpack_query(q_codes, q_scales, q)
        plan.unpack_key(k_codes, k_scales, k)
        if value is None:
            plan.make_value(*v_codes, v)
        else:
            quantized, unquantized = (v, v_kept) if plan.quantizes_value else (None, v)
            plan.make_value(value, key_mask, leftpad, cu_seqlens_k, quantized, unquantized, None, None)
        plan.preprocess(grad_out, out_hp, stats, cu_seqlens_q, scaled_grad_out, grad_out_operand, delta)
        if mean_scores is not None:
            blocks = (side.batch, side.num_heads, side.blocks(plan.tiles.grad_query.block_m), plan.keys.max_seqlen)
            grad_sums = grad_query.new_zeros(blocks, dtype=torch.float32)
        plan.grad_query(
            q, k, v, v_kept, key_mask, leftpad, cu_seqlens_q, cu_seqlens_k, mean_scores, grad_sums, lower, upper,
            grad_out, delta, stats, grad_query,
        )  # fmt: skip
        plan.grad_key_value(
            q, k, v, scaled_grad_out, v_kept, grad_out_operand,
            key_mask, leftpad, cu_seqlens_q, cu_seqlens_k, mean_scores, lower, upper, delta, stats, grad_key, grad_value,
        )  # fmt: skip
        if grad_sums is not None:
            tiles_of_block = SMOOTH_BLOCK // plan.tiles.grad_query.block_m
            grad_sums = grad_sums.unflatten(2, (-1, tiles_of_block)).sum(3) * plan.softmax_scale
            grad_query = smoothing.grad_query(grad_query.float(), grad_sums, smoothed.key.float()).to(dtype)
            grad_key = smoothing.grad_key(grad_key.float(), grad_sums, smoothed.query_mean.float()).to(dtype)
        if sinks is not None:
            by_head = (1 if packing is not None else side.batch, side.num_heads, side.rows)
            shares = torch.exp2((sinks.float() * LOG2_E)[:, None] - stats[1].view(by_head))
            grad_sinks = -(shares * delta[0].view(by_head)).sum((0, 2)).to(sinks.dtype)
    return grad_query, grad_key, grad_value, grad_sinks
