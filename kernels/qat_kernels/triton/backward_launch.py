"""The backward of docs/NUMERICS.md, section 5, as Triton kernels: planned once, as in forward_launch.py."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from qat_kernels import smoothing
from qat_kernels.mask import Bounds, Mask
from qat_kernels.reference import LOG2_E, gradient_shapes
from qat_kernels.spec import SMOOTH_BLOCK, QuantSpec
from qat_kernels.varlen import Packing

from . import tiles
from .device import arch_of, gluon_version, on_device
from .grad_key_value import grad_key_value_kernel
from .grad_query import grad_query_kernel
from .layout import PAD
from .operands import (
    NOTHING,
    PLANS,
    Given,
    Layout,
    Sequences,
    allowed_keys,
    contiguous_strides,
    given_tensors,
    is_operand,
    operand_dtype,
    preprocess_job,
    together,
    tokens_job,
    unpack_job,
)
from .precompiled import Launch, New, Pointer, Tiles, new, parts, pointer, starts
from .problem import PackedSizes, Problem, is_empty


class _Plan(NamedTuple):
    """All of a backward but its tensors."""

    queries: Sequences
    keys: Sequences
    tiles: tiles.Tiles
    new_grad_query: New
    new_grad_key: New
    new_grad_value: New
    codes: list[int]
    """Where codes and scales of Q, K and V begin."""
    codes_end: int
    """And where they end."""
    new_operands: New
    operands: list[int]
    """Where each begins in the memory that they share: Q, K, V, dO with the factor of its rows, and where groups are kept dO,
    unless the given tensor serves, and, if V is quantized, V as they are."""
    new_delta: New
    prepare: Launch
    """Unpacks Q, K and V, or where V is read again quantizes it; `preprocess_job`."""
    quantizes_value: bool
    two_values: bool
    """Whether V is needed quantized, and as it is for the kept groups."""
    copies_grad_out: bool
    """Whether dO is needed as it is for the kept groups, and does not lie as an operand would."""
    grad_query: Any
    grad_key_value: Any
    splits: int
    """In how many parts dK and dV are computed, one for some of the queries each."""
    softmax_scale: float


@lru_cache(PLANS)
def _plan(
    device: torch.device,
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
    has_sinks: bool,
) -> _Plan | None:
    """None if there is nothing to compute."""
    if is_empty(grad_out.shape, key_shape, packed):
        return None
    query_shape, _, value_shape = gradient_shapes(grad_out.shape, key_shape)
    problem = Problem.of(
        query_shape, value_shape, packed, spec=spec, mask=mask, scale=scale, softcap=softcap, key_bias=given.q_shift
    )  # fmt: skip
    options = tiles.options_of(
        spec, bounds=not mask.is_plain, irregular=mask.is_irregular, softcap=softcap is not None, packed=packed is not None,
        key_mask=given.key_mask,
        q_shift=given.q_shift, sinks=has_sinks, unequal_head_dims=problem.head_dim != problem.head_dim_v,
    )  # fmt: skip
    chosen = tiles.choose(arch_of(device), max(problem.head_dim, problem.head_dim_v), mask.hides_keys, options, gluon_version())
    queries, keys, operand = problem.query, problem.key, operand_dtype(grad_out.dtype)
    kept, quantizes_value = keys.lead > 0, spec.formats.value is not None
    two_values = quantizes_value and kept
    copies_grad_out = kept and not is_operand(grad_out, queries, operand)
    grad_query: object
    grad_key_value: object
    splits = 1
    if isinstance(tile := chosen.grad_query, tiles.HopperTile):
        from .hopper.backward_launch import grad_query_launch

        grad_query = grad_query_launch(problem, tile, grad_out, given)
    else:
        grad_query = _grad_query_launch(problem, tile, grad_out, given)
    if isinstance(key_tile := chosen.grad_key_value, tiles.HopperTile):
        from .hopper.backward_launch import grad_key_value_launch

        grad_key_value = grad_key_value_launch(problem, key_tile, key_shape, grad_out.dtype, given)
        splits = grad_key_value.splits
    elif isinstance(key_tile, tiles.Apart):
        grad_key_value = _Apart(
            _grad_key_value_launch(problem, key_tile.key, key_shape, grad_out.dtype, given, value=False),
            _grad_key_value_launch(problem, key_tile.value, key_shape, grad_out.dtype, given, key=False),
        )
    else:
        grad_key_value = _grad_key_value_launch(problem, key_tile, key_shape, grad_out.dtype, given)
    if value is None:
        prepare_value = unpack_job(keys, problem.head_dim_v, operand, along_tokens=True)
    else:
        prepare_value = tokens_job(
            value, keys, given, spec.formats.value,
            quantized=operand if quantizes_value else None, unquantized=operand if kept or not quantizes_value else None,
        )  # fmt: skip
    rows_q, rows_k, block_d, block_dv = queries.all_rows, keys.all_rows, problem.block_d, problem.block_dv
    of_grad_out, of_value = rows_q * block_dv, rows_k * block_dv
    of_query, of_key, of_grad_outs = rows_q * block_d, rows_k * block_d, [of_grad_out] * (1 + copies_grad_out)
    sizes = [of_query, of_key, of_value, *of_grad_outs, *[of_value] * two_values]
    operands, operands_size = starts(sizes)
    # With a mask, keys that no query may see are not visited.
    new_grad_key, new_grad_value = (
        new(shape, grad_out.dtype, device, zeros=given.key_mask) for shape in (key_shape, value_shape)
    )
    return _Plan(
        queries, keys, chosen, new(query_shape, grad_out.dtype, device), new_grad_key, new_grad_value,
        *starts(problem.code_sizes()), new((operands_size,), operand, device), operands,
        # What is summed for the sinks has gaps between packed sequences, which no kernel writes.
        new((2, rows_q), torch.float32, device, zeros=has_sinks),
        together(
            unpack_job(queries, problem.head_dim, operand, along_tokens=False),
            unpack_job(keys, problem.head_dim, operand, along_tokens=False),
            prepare_value,
            preprocess_job(grad_out, out_hp, queries, given, operand, copies_grad_out),
        ),
        quantizes_value, two_values, copies_grad_out, grad_query, grad_key_value, splits, problem.softmax_scale,
    )  # fmt: skip


def _grad_query_launch(problem: Problem, tile: tiles.Tile, grad_out: Layout, given: Given) -> Launch:
    """The launch of the Triton kernel of dQ."""
    query_shape = torch.Size((*grad_out.shape[:-1], problem.head_dim))
    queries, num_blocks, sage = problem.query, problem.query.blocks(tile.block_m), problem.spec.formats.smooth is not None
    operand, float32, cu_seqlens = operand_dtype(grad_out.dtype), Pointer(torch.float32), _cu_seqlens(problem, given)
    q, k, v, _ = _operand_tiles(problem, tile, operand)
    return Launch.of(
        grad_query_kernel,
        (queries.batch * queries.num_heads * num_blocks,),
        [
            q, k, v, v if problem.key.lead else None, *given.key_mask_pointers(), cu_seqlens, cu_seqlens,
            float32 if problem.key_bias else None, float32 if sage else None, float32 if sage else None, *given.bound_pointers(),
            grad_out.pointer, float32, float32, Pointer(grad_out.dtype),
        ],
        [
            given.bounds_stride, *grad_out.strides, *contiguous_strides(query_shape)[:3], *_numbers(problem, given, num_blocks),
            math.copysign(problem.softmax_scale, problem.scale),
        ],
        _constants(problem, given, tile),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


class _Apart(NamedTuple):
    """The launches of dK and of dV, with the tensors of one that computes both."""

    key: Launch
    value: Launch

    def __call__(self, *tensors: Any) -> None:
        """Launch them on the current device and stream."""
        *others, grad_key, grad_value = tensors
        self.key(*others, grad_key, None)
        self.value(*others, None, grad_value)


def _grad_key_value_launch(
    problem: Problem,
    tile: tiles.Tile,
    key_shape: torch.Size,
    dtype: torch.dtype,
    given: Given,
    *,
    key: bool = True,
    value: bool = True,
) -> Launch:
    """The launch of the Triton kernel of dK and dV, which have this dtype, or of one of them."""
    keys, kept, operand = problem.key, problem.key.lead > 0, operand_dtype(dtype)
    # Where groups are kept, the first block ends with the sink group, which ends PAD slots.
    num_blocks = keys.blocks(tile.block_n) - (PAD // tile.block_n - 1 if kept else 0)
    float32, cu_seqlens = Pointer(torch.float32), _cu_seqlens(problem, given)
    q, k, v, grad_out_tiles = _operand_tiles(problem, tile, operand)
    return Launch.of(
        grad_key_value_kernel,
        (keys.batch * keys.num_heads * num_blocks,),
        [
            q, k, v, grad_out_tiles, v if kept else None, grad_out_tiles if kept else None,
            *given.key_mask_pointers(), cu_seqlens, cu_seqlens,
            float32 if problem.key_bias else None, given.pointer(torch.float32, given.q_shift),
            float32 if problem.spec.formats.smooth is not None else None, *given.bound_pointers(),
            float32, float32, Pointer(dtype) if key else None, Pointer(dtype) if value else None,
        ],
        [
            given.bounds_stride, *contiguous_strides(torch.Size((*key_shape[:-1], 1)))[:3],
            *_numbers(problem, given, num_blocks), problem.softmax_scale, problem.scale if problem.key_bias else None,
        ],
        _constants(problem, given, tile),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _operand_tiles(problem: Problem, tile: tiles.Tile, operand: torch.dtype) -> tuple[Tiles, Tiles, Tiles, Tiles]:
    """Those of Q, K, V and dO."""
    rows_q, rows_k, block_d, block_dv = problem.query.all_rows, problem.key.all_rows, problem.block_d, problem.block_dv
    return (
        Tiles(operand, (rows_q, block_d), tile.block_m), Tiles(operand, (rows_k, block_d), tile.block_n),
        Tiles(operand, (rows_k, block_dv), tile.block_n), Tiles(operand, (rows_q, block_dv), tile.block_m),
    )  # fmt: skip


def _cu_seqlens(problem: Problem, given: Given) -> Pointer | None:
    return given.pointer(torch.int32, problem.query.packed)


def _numbers(problem: Problem, given: Given, num_blocks: int) -> list[int | float]:
    """Those that both kernels take behind the strides of gradients."""
    queries, keys = problem.query, problem.key
    return [
        keys.rows if given.key_mask else 0, *problem.sizes, num_blocks,
        queries.rows, keys.rows, queries.all_rows, problem.softmax_scale_log2,
    ]  # fmt: skip


def _constants(problem: Problem, given: Given, tile: tiles.Tile) -> dict[str, Any]:
    return problem.constants | {"HAS_KEY_MASK": given.key_mask, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}


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
    q_shift: torch.Tensor | None = None,
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
    device, dtype = grad_out.device, grad_out.dtype
    with on_device(device):
        given, _, q_shift, lower, upper, _ = given_tensors(key_mask, None, q_shift, packing, bounds, None)
        plan = _plan(
            device, Layout.of(grad_out), Layout.of(out_hp), None if value is None else Layout.of(value), key_shape,
            PackedSizes.of(packing), given, spec, mask, scale, softcap, sinks is not None,
        )  # fmt: skip
        if plan is None:
            grad_query, grad_key, grad_value = map(grad_out.new_zeros, gradient_shapes(grad_out.shape, key_shape))
            return grad_query, grad_key, grad_value, None if sinks is None else torch.zeros_like(sinks)
        grad_query, grad_key, grad_value = plan.new_grad_query(), plan.new_grad_key(), plan.new_grad_value()
        operands, delta, grad_sinks = plan.new_operands(), plan.new_delta(), None
        q, k, v, scaled_grad_out, *others = parts(operands, plan.operands)
        grad_out_copy = others.pop(0) if plan.copies_grad_out else None
        v_kept = others.pop() if plan.two_values else None
        q_codes, q_scales, k_codes, k_scales, *v_codes = parts(codes, plan.codes)
        at_grad_out, at_delta, at_stats = pointer(grad_out), pointer(delta), pointer(stats)
        grad_sums = None
        at_mask = at_leftpad = cu_q = cu_k = at_bias = at_q_shift = at_scores = at_sums = at_lower = at_upper = None
        if given is not NOTHING:
            key_mask, leftpad = allowed_keys(key_mask, plan.keys)
            cu_q, cu_k = (None, None) if packing is None else map(pointer, packing[:2])
            at_mask, at_leftpad, at_lower, at_upper = map(pointer, (key_mask, leftpad, lower, upper))
        if q_shift is not None:
            key_bias = codes[plan.codes_end :].view(torch.float32)
            at_bias, at_q_shift = map(pointer, (key_bias, q_shift))
        if spec.formats.smooth is not None:
            assert query is not None and key is not None, "Q and K are read again"
            smoothed = smoothing.smooth(query, key)
            if isinstance(plan.tiles.grad_query, tiles.Tile):
                blocks = plan.queries.blocks(plan.tiles.grad_query.block_m)
                shape = plan.queries.batch, plan.queries.num_heads, blocks, plan.keys.max_seqlen
                grad_sums = grad_query.new_zeros(shape, dtype=torch.float32)
            at_scores, at_sums = pointer(smoothed.scores), pointer(grad_sums)
        if value is None:
            of_value: tuple[Any, ...] = (*v_codes, v)
        else:
            quantized, unquantized = (v, v_kept) if plan.quantizes_value else (None, v)
            of_value = (pointer(value), at_mask, at_leftpad, cu_k, quantized, unquantized, None, None)
        plan.prepare((
            (q_codes, q_scales, q),
            (k_codes, k_scales, k),
            of_value,
            (at_grad_out, pointer(out_hp), at_stats, cu_q, scaled_grad_out, grad_out_copy, at_delta),
        ))  # fmt: skip
        plan.grad_query(
            q, k, v, v_kept, at_mask, at_leftpad, cu_q, cu_k, at_bias, at_scores, at_sums, at_lower, at_upper,
            at_grad_out, at_delta, at_stats, pointer(grad_query),
        )  # fmt: skip
        parts_of_key, parts_of_value = grad_key, grad_value
        if plan.splits > 1:
            like = torch.empty_like if key_mask is None else torch.zeros_like
            parts_of_key, parts_of_value = (
                like(x.expand(plan.splits, *x.shape), dtype=torch.float32, memory_format=torch.contiguous_format)
                for x in (grad_key, grad_value)
            )
        grad_out_kept = at_grad_out if plan.keys.lead and grad_out_copy is None else grad_out_copy
        plan.grad_key_value(
            q, k, v, scaled_grad_out, v_kept, grad_out_kept, at_mask, at_leftpad, cu_q, cu_k, at_bias, at_q_shift, at_scores,
            at_lower, at_upper, at_delta, at_stats, pointer(parts_of_key), pointer(parts_of_value),
        )  # fmt: skip
        if plan.splits > 1:
            grad_key.copy_(parts_of_key.sum(0))
            grad_value.copy_(parts_of_value.sum(0))
        if grad_sums is not None:
            tiles_of_block = grad_sums.shape[2] * SMOOTH_BLOCK // plan.queries.blocks(1)
            grad_sums = grad_sums.unflatten(2, (-1, tiles_of_block)).sum(3) * plan.softmax_scale
            grad_query = smoothing.grad_query(grad_query.float(), grad_sums, smoothed.key.float()).to(dtype)
            grad_key = smoothing.grad_key(grad_key.float(), grad_sums, smoothed.query_mean.float()).to(dtype)
        if sinks is not None:
            by_head = (1 if packing is not None else plan.queries.batch, plan.queries.num_heads, plan.queries.rows)
            shares = torch.exp2((sinks.float() * LOG2_E)[:, None] - stats[1].view(by_head))
            grad_sinks = -(shares * delta[0].view(by_head)).sum((0, 2)).to(sinks.dtype)
    return grad_query, grad_key, grad_value, grad_sinks
