"""The forward of docs/NUMERICS.md as Triton kernels: a call is planned once, then tensors are made and kernels launched."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from qat_kernels import smoothing
from qat_kernels.mask import Bounds, Mask
from qat_kernels.reference import empty_out
from qat_kernels.spec import NVFP4Format, QuantSpec
from qat_kernels.varlen import Packing, lse_shape

from . import tiles
from .device import arch_of, check_device, gluon_version, on_device
from .forward import attention_forward_kernel
from .operands import (
    NOTHING,
    PLANS,
    Given,
    Layout,
    Sequences,
    allowed_keys,
    given_tensors,
    head_strides,
    operand_dtype,
    order_of,
    rows_job,
    strides_of,
    together,
    tokens_job,
)
from .precompiled import Launch, New, Pointer, Tiles, new, parts, pointer, starts
from .problem import PackedSizes, Problem, is_empty


class Forward(NamedTuple):
    """What a forward returns. All but `out` and `lse` are for the backward, and None where there will be none."""

    out: torch.Tensor
    """O, as Q but with the head dim of V."""
    out_hp: torch.Tensor | None
    """O' in high precision, likewise; None with BF16 PV too, where O serves."""
    lse: torch.Tensor
    """float32 [B, H, Lq], or [H, total] of packed sequences."""
    stats: torch.Tensor | None
    """float32 [2, rows of Q]: m and the base-2 log-sum-exp of the quantized scores; +inf in rows without a (quantized) key."""
    codes: torch.Tensor | None
    """uint8: the codes and scales of Q, K and, unless V itself is read again, V; behind them the key bias, if there is one."""


def output_shapes(
    query: torch.Size,
    value: torch.Size,
    packing: Packing | None = None,
    *,
    spec: QuantSpec,
    mask: Mask,
    with_gradient: bool,
    key_bias: bool = False,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of `Forward.stats` and `Forward.codes`."""
    packed = PackedSizes.of(packing)
    if is_empty(query, value, packed):
        return (0,), (0,)
    problem = Problem.of(query, value, packed, spec=spec, mask=mask, scale=1.0, key_bias=key_bias)
    if not with_gradient:
        return (0,), (0,)
    return (2, problem.query.all_rows), (sum(problem.code_sizes()) + problem.key_bias_size(),)


class _Plan(NamedTuple):
    """All of a forward but its tensors."""

    keys: Sequences
    new_out: New
    new_out_hp: New | None
    new_lse: New
    new_stats: New | None
    new_codes: New | None
    codes: list[int]
    """Where codes and scales of Q, K and V begin."""
    codes_end: int
    """And where they end."""
    new_key_bias: New | None
    """Where there is a key bias and nothing is saved."""
    new_operands: New
    operands: list[int]
    """Where each begins in the memory that they share: Q, K, V and, where groups are kept, V as it is."""
    quantizes_value: bool
    prepare: Launch
    """Quantizes Q, K and V."""
    attend: Any
    """A `Launch`, or an `Attend` of hopper/, which takes the same tensors; so are those of a backward."""
    reads_query: bool
    """Whether `attend` is an `AttendToAll` of hopper/, which quantizes Q itself."""


@lru_cache(PLANS)
def _plan(
    device: torch.device,
    query: Layout,
    key: Layout,
    value: Layout,
    stride: tuple[int, ...],
    packed: PackedSizes | None,
    given: Given,
    spec: QuantSpec,
    mask: Mask,
    scale: float,
    softcap: float | None,
    with_gradient: bool,
) -> _Plan | None:
    """None if there is nothing to compute. `stride`: of Q as the caller gave it."""
    check_device(device)
    if is_empty(query.shape, value.shape, packed):
        return None
    problem = Problem.of(
        query.shape, value.shape, packed, spec=spec, mask=mask, scale=scale, softcap=softcap, key_bias=given.q_shift
    )  # fmt: skip
    options = tiles.options_of(
        spec, bounds=not mask.is_plain, irregular=mask.is_irregular, softcap=softcap is not None, packed=packed is not None,
        key_mask=given.key_mask,
        k_shift=given.k_shift, q_shift=given.q_shift, sinks=given.sinks, with_gradient=with_gradient,
        unequal_head_dims=problem.head_dim != problem.head_dim_v,
    )  # fmt: skip
    tile = tiles.choose(
        arch_of(device), max(problem.head_dim, problem.head_dim_v), mask.hides_keys, options, gluon_version()
    ).forward
    out = empty_out(torch.empty_strided(query.shape, stride, dtype=value.dtype, device="meta"), value.shape[-1])
    to_all = None
    if isinstance(tile, tiles.HopperTile) and hardware_copies(query, strides_of(out)) and rounds_plainly(problem):
        to_all = tiles.to_all_of(problem.head_dim, mask.hides_keys, options, problem.key.max_seqlen)
    tile = to_all or tile
    formats, order, operand = spec.formats, order_of(tile.block_n), operand_dtype(value.dtype)
    quantizes_value = formats.value is not None
    two_values = quantizes_value and problem.key.lead > 0
    rows_q, rows_k = problem.query.all_rows, problem.key.all_rows
    sizes = [0 if to_all else rows_q * problem.block_d, rows_k * problem.block_d]
    sizes += [rows_k * problem.block_dv] * (2 if two_values else 1)
    attend: object
    if to_all:
        from .hopper.forward_launch import attend_to_all_launch

        attend = attend_to_all_launch(problem, to_all, query, strides_of(out), with_gradient)
    elif isinstance(tile, tiles.HopperTile):
        from .hopper.forward_launch import attend_launch

        attend = attend_launch(problem, tile, strides_of(out), value.dtype, given, with_gradient)
    else:
        attend = _attend_launch(problem, tile, strides_of(out), value.dtype, given, with_gradient)
    codes, codes_size = starts(problem.code_sizes())
    operands, operands_size = starts(sizes)
    of_query = rows_job(
        query, problem.query, given, formats.query, is_k=False, negate=scale < 0, rotate=spec.rotate,
        heads_per_shift=problem.query.num_heads // problem.key.num_heads if given.k_shift or given.q_shift else 1,
        operand=operand, codes=with_gradient,
    )  # fmt: skip
    new_out, saved = new(out.shape, out.dtype, device, stride=out.stride()), partial(new, device=device, zeros=packed is not None)
    return _Plan(
        keys=problem.key,
        new_out=new_out,
        new_out_hp=new_out if with_gradient and spec.quantizes_pv else None,
        new_lse=new(lse_shape(query.shape, packed), torch.float32, device),
        # Packed sequences leave gaps between them, which no kernel writes or reads.
        new_stats=saved((2, rows_q), torch.float32) if with_gradient else None,
        new_codes=saved((codes_size + problem.key_bias_size(),), torch.uint8) if with_gradient else None,
        codes=codes,
        codes_end=codes_size,
        new_key_bias=new((rows_k,), torch.float32, device) if given.q_shift and not with_gradient else None,
        new_operands=new((operands_size,), operand, device),
        operands=operands,
        quantizes_value=quantizes_value,
        prepare=together(
            *(() if to_all else (of_query,)),
            rows_job(
                key, problem.key, given, formats.key, is_k=True, order=order, rotate=spec.rotate, negate=scale < 0,
                operand=operand, codes=with_gradient,
            ),
            tokens_job(
                value, problem.key, given, formats.value, order=order,
                quantized=operand if quantizes_value else None,
                unquantized=None if quantizes_value and not two_values else operand,
                codes=with_gradient and len(problem.code_sizes()) > 4,
            ),
        ),
        attend=attend,
        reads_query=to_all is not None,
    )  # fmt: skip


def hardware_copies(query: Layout, out_strides: tuple[int, ...]) -> bool:
    """Whether Hopper can copy tiles of Q as it is, and of O."""
    return query.dtype == torch.bfloat16 and query.aligned and all(
        strides[-1] == 1 and all(each > 0 and each % 8 == 0 for each in strides[:-1]) for strides in (query.strides, out_strides)
    )  # fmt: skip


def rounds_plainly(problem: Problem) -> bool:
    """Whether Q is rounded as hopper/queries.py does it."""
    return problem.spec.formats.query == NVFP4Format() and not problem.spec.rotate and problem.scale >= 0


def _attend_launch(
    problem: Problem, tile: tiles.Tile, out_strides: tuple[int, ...], dtype: torch.dtype, given: Given, with_gradient: bool
) -> Launch:
    """The Triton kernel for outputs of this dtype and these strides."""
    queries, keys, spec, operand = problem.query, problem.key, problem.spec, operand_dtype(dtype)
    has_out_hp = with_gradient and spec.quantizes_pv
    num_blocks = queries.blocks(tile.block_m)
    float32, out, cu_seqlens = Pointer(torch.float32), Pointer(dtype), given.pointer(torch.int32, queries.packed)
    value_tiles = Tiles(operand, (keys.all_rows, problem.block_dv), tile.block_n)
    return Launch.of(
        attention_forward_kernel,
        (queries.batch * queries.num_heads * num_blocks,),
        [
            Tiles(operand, (queries.all_rows, problem.block_d), tile.block_m),
            Tiles(operand, (keys.all_rows, problem.block_d), tile.block_n),
            value_tiles, value_tiles if keys.lead else None, *given.key_mask_pointers(),
            float32 if given.k_shift else None, cu_seqlens, cu_seqlens,
            float32 if problem.key_bias else None, float32 if spec.formats.smooth is not None else None, *given.bound_pointers(),
            given.pointer(torch.float32, given.sinks),
            out, out if has_out_hp else None, float32, float32 if with_gradient else None,
        ],
        [
            given.bounds_stride, *out_strides, *head_strides(problem.query), problem.key.rows if given.key_mask else 0,
            *problem.sizes, num_blocks, problem.query.rows, problem.key.rows, problem.query.all_rows,
            problem.softmax_scale_log2, problem.scale,
        ],
        {
            **problem.constants, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "ORDER": order_of(tile.block_n),
            "HAS_KEY_MASK": given.key_mask, "OUT_HP": has_out_hp, "STORE_STATS": with_gradient,
            "HAS_K_SHIFT": given.k_shift, "HAS_SINKS": given.sinks,
        },
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    packing: Packing | None = None,
    *,
    spec: QuantSpec,
    mask: Mask,
    scale: float,
    with_gradient: bool,
    q_shift: torch.Tensor | None = None,
    bounds: Bounds | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Forward:
    """docs/NUMERICS.md, sections 3 and 4.

    Raises:
        ValueError: the tensors are not on an NVIDIA GPU from sm_80 on.
    """
    device, stride = query.device, query.stride()
    with on_device(device):
        mean_scores = None
        if spec.formats.smooth is not None and query.numel() and key.numel():
            query, key, _, mean_scores = smoothing.smooth(query, key)
        given, k_shift, q_shift, lower, upper, sinks = given_tensors(key_mask, k_shift, q_shift, packing, bounds, sinks)
        plan = _plan(
            device, Layout.of(query), Layout.of(key), Layout.of(value), stride, PackedSizes.of(packing), given,
            spec, mask, scale, softcap, with_gradient,
        )  # fmt: skip
        if plan is None:
            return _nothing(query, value, packing, sinks, with_gradient=with_gradient, has_out_hp=spec.quantizes_pv)
        out, lse = plan.new_out(), plan.new_lse()
        out_hp = plan.new_out_hp and plan.new_out_hp()
        stats = codes = key_bias = None
        q_codes = q_scales = k_codes = k_scales = v_codes = v_scales = None
        if plan.new_stats and plan.new_codes:
            stats, codes = plan.new_stats(), plan.new_codes()
            q_codes, q_scales, k_codes, k_scales, *v_parts = parts(codes, plan.codes)
            v_codes, v_scales = v_parts or (None, None)
            if q_shift is not None:
                key_bias = codes[plan.codes_end :].view(torch.float32)
        elif plan.new_key_bias:
            key_bias = plan.new_key_bias()
        operands = plan.new_operands()
        q, k, v, kept, *_ = *parts(operands, plan.operands), None
        at_mask = at_leftpad = at_shift = at_products = at_q_shift = at_bias = cu_q = cu_k = None
        at_scores = at_lower = at_upper = at_sinks = None
        if given is not NOTHING or mean_scores is not None:
            q_dot_k_shift = None if k_shift is None else torch.empty_like(lse)
            key_mask, leftpad = allowed_keys(key_mask, plan.keys)
            cu_q, cu_k = (None, None) if packing is None else map(pointer, packing[:2])
            at_mask, at_leftpad, at_shift, at_products = map(pointer, (key_mask, leftpad, k_shift, q_dot_k_shift))
            at_q_shift, at_bias = map(pointer, (q_shift, key_bias))
            at_scores, at_lower, at_upper, at_sinks = map(pointer, (mean_scores, lower, upper, sinks))
        quantized, unquantized = (v, kept) if plan.quantizes_value else (None, v)
        of_query = (pointer(query), at_shift, at_q_shift, None, None, cu_q, q, q_codes, q_scales, at_products, None)
        plan.prepare((
            *(() if plan.reads_query else (of_query,)),
            (pointer(key), at_shift, at_q_shift, at_mask, at_leftpad, cu_k, k, k_codes, k_scales, None, at_bias),
            (pointer(value), at_mask, at_leftpad, cu_k, quantized, unquantized, v_codes, v_scales),
        ))  # fmt: skip
        if plan.reads_query:
            plan.attend(pointer(query), k, v, q_codes, q_scales, *map(pointer, (out, out_hp, lse, stats)))
            return Forward(out, out_hp, lse, stats, codes)
        plan.attend(
            q, k, v, kept, at_mask, at_leftpad, at_products, cu_q, cu_k, at_bias, at_scores, at_lower, at_upper, at_sinks,
            pointer(out), pointer(out_hp), pointer(lse), pointer(stats),
        )  # fmt: skip
    return Forward(out, out_hp, lse, stats, codes)


def _nothing(
    query: torch.Tensor,
    value: torch.Tensor,
    packing: Packing | None,
    sinks: torch.Tensor | None,
    *,
    with_gradient: bool,
    has_out_hp: bool,
) -> Forward:
    """Where there is nothing to compute."""
    out = empty_out(query, value.shape[-1]).zero_()
    lse = out.new_full(lse_shape(query.shape, packing), -torch.inf, dtype=torch.float32)
    if sinks is not None:
        lse.copy_(sinks[:, None])
    if not with_gradient:
        return Forward(out, None, lse, None, None)
    return Forward(out, torch.zeros_like(out) if has_out_hp else None, lse, lse.new_empty(0), out.new_empty(0, dtype=torch.uint8))
