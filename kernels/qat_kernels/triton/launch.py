"""The attention of docs/NUMERICS.md as Triton kernels: prepares the operands, chooses tiles and launches.

Takes what reference.py and varlen.py take and returns the same, plus what its own backward reads. Needs an NVIDIA GPU from sm_80
on (or Triton's interpreter).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from qat_kernels import smoothing
from qat_kernels.mask import Bounds, Mask
from qat_kernels.reference import LOG2_E
from qat_kernels.spec import SMOOTH_BLOCK, Formats, QuantSpec
from qat_kernels.varlen import Packing, lse_shape

from . import operands, tiles
from .backward import grad_key_value_kernel, grad_query_kernel, preprocess_kernel
from .device import TRITON, arch_of, check_device, on_device
from .forward import attention_forward_kernel
from .layout import PAD
from .operands import (
    AllowedKeys,
    Codes,
    allowed_keys,
    bound_pointers,
    bounds_stride,
    descriptors,
    head_strides,
    key_mask_pointers,
    key_mask_stride,
    operand_dtype,
    order_of,
    quantize_rows,
    quantize_tokens,
    strides_of,
    unpack,
)
from .problem import Problem


class Forward(NamedTuple):
    """What a forward returns. All but `out` and `lse` are for the backward, and empty where there will be none."""

    out: torch.Tensor
    """O, in the shape, strides and dtype of Q."""
    out_hp: torch.Tensor
    """O' in high precision, likewise; empty with BF16 PV too, where O serves."""
    lse: torch.Tensor
    """float32 [B, H, Lq], or [H, total] of packed sequences."""
    stats: torch.Tensor
    """float32 [2, rows of Q]: m and the base-2 log-sum-exp of the quantized scores; +inf in rows without a (quantized) key."""
    codes: torch.Tensor
    """uint8: the codes and scales of Q, K and, unless V itself is read again, V."""


def output_shapes(
    query: torch.Size, key: torch.Size, packing: Packing | None = None, *, spec: QuantSpec, mask: Mask, with_gradient: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of `Forward.stats` and `Forward.codes`."""
    problem = Problem.of(query, key, packing, spec=spec, mask=mask, scale=1.0)
    if not with_gradient or problem.empty:
        return (0,), (0,)
    return (2, problem.query.all_rows), (problem.code_bytes(),)


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
    bounds: Bounds | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Forward:
    """docs/NUMERICS.md, sections 3 and 4.

    Raises:
        ValueError: the tensors are not on an NVIDIA GPU from sm_80 on.
    """
    check_device(query.device)
    problem = Problem.of(query.shape, key.shape, packing, spec=spec, mask=mask, scale=scale, softcap=softcap)
    with_out_hp = with_gradient and spec.quantizes_pv
    stats_shape, codes_shape = output_shapes(query.shape, key.shape, packing, spec=spec, mask=mask, with_gradient=with_gradient)
    # Packed sequences leave gaps between them, which no kernel writes or reads.
    new = query.new_empty if packing is None else query.new_zeros
    result = Forward(
        out=torch.empty_like(query),
        out_hp=torch.empty_like(query) if with_out_hp else query.new_empty(0),
        lse=query.new_empty(lse_shape(query.shape, packing), dtype=torch.float32),
        stats=new(stats_shape, dtype=torch.float32),
        codes=new(codes_shape, dtype=torch.uint8),
    )
    if problem.empty:
        result.out.zero_(), result.out_hp.zero_(), result.lse.fill_(-torch.inf)
        if sinks is not None:
            result.lse[:] = sinks[:, None]
        return result
    formats, smoothed = spec.formats, None
    with on_device(query.device):
        if formats.smooth is not None:
            smoothed = smoothing.smooth(query, key)
            query, key = smoothed.query, smoothed.key
        allowed = allowed_keys(key_mask, problem.key)
        tile = _tiles(query.device, problem).forward
        order = order_of(tile.block_n)
        q_codes, k_codes, v_codes = problem.codes_in(result.codes) if with_gradient else (None, None, None)
        q_dot_k_shift = None
        if k_shift is not None:
            k_shift, q_dot_k_shift = k_shift.contiguous(), torch.empty_like(result.lse)
        q = quantize_rows(
            query, problem.query, is_k=False, k_shift=k_shift, q_dot_k_shift=q_dot_k_shift, negate=scale < 0,
            rotate=spec.rotate, **problem.rounding(formats.query), codes=q_codes,
        )  # fmt: skip
        k = quantize_rows(
            key, problem.key, is_k=True, order=order, allowed=allowed, k_shift=k_shift,
            rotate=spec.rotate, **problem.rounding(formats.key), codes=k_codes,
        )  # fmt: skip
        v, v_kept = _value_operands(value, problem, allowed, order, codes=v_codes)
        num_blocks = problem.query.blocks(tile.block_m)
        attention_forward_kernel[(problem.query.batch * problem.query.num_heads * num_blocks,)](
            *descriptors([q, k, v, v_kept], [tile.block_m, tile.block_n, tile.block_n, tile.block_n]),
            *key_mask_pointers(allowed), q_dot_k_shift, problem.query.cu_seqlens, problem.key.cu_seqlens,
            None if smoothed is None else smoothed.scores, *bound_pointers(bounds),
            None if sinks is None else sinks.float(), result.out, result.out_hp, result.lse, result.stats,
            bounds_stride(bounds), *strides_of(result.out), *head_strides(result.lse), key_mask_stride(allowed),
            *problem.sizes, num_blocks, problem.query.rows, problem.key.rows, problem.query.all_rows,
            problem.softmax_scale_log2, scale,
            **problem.constants, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, ORDER=order, HAS_KEY_MASK=allowed is not None,
            QUANTIZE_PV=spec.quantizes_pv, SAGE=smoothed is not None, OUT_HP=with_out_hp, STORE_STATS=with_gradient,
            HAS_K_SHIFT=k_shift is not None, HAS_SINKS=sinks is not None, **problem.options,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return result


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """docs/NUMERICS.md, section 5: dQ, dK, dV, contiguous, in the dtype of dO, and that of the sinks (empty without).

    Args:
        value: V where it is read as it is (`QuantSpec.reads_value`), else None.
        query, key: Q and K where they are (`QuantSpec.reads_query`), else None.
        out_hp: O', or O with BF16 PV.
        stats, codes: of `forward`.
    """
    problem = Problem.of(grad_out.shape, key_shape, packing, spec=spec, mask=mask, scale=scale, softcap=softcap)
    # With a mask, keys that no query may see are not visited.
    new = torch.empty if key_mask is None else torch.zeros
    dtype, device = grad_out.dtype, grad_out.device
    grad_query = torch.empty(grad_out.shape, dtype=dtype, device=device)
    grad_key, grad_value = (new(key_shape, dtype=dtype, device=device) for _ in range(2))
    grad_sinks = grad_out.new_empty(0) if sinks is None else torch.zeros_like(sinks)
    if problem.empty:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_(), grad_sinks
    side, kept = problem.query, problem.key.lead > 0
    operand = operand_dtype(dtype)
    scaled_grad_out = grad_out.new_empty((side.all_rows, problem.block_d), dtype=operand)
    grad_out_operand = torch.empty_like(scaled_grad_out) if kept else None
    # What is summed for the sinks has gaps between packed sequences, which no kernel writes.
    delta = torch.empty_like(stats) if sinks is None else torch.zeros_like(stats)
    smoothed = grad_sums = None
    with on_device(device):
        if spec.formats.smooth is not None:
            assert query is not None and key is not None, "Q and K are read again"
            smoothed = smoothing.smooth(query, key)
        allowed = allowed_keys(key_mask, problem.key)
        q_codes, k_codes, v_codes = problem.codes_in(codes)
        q, k = unpack(q_codes, operand, along_tokens=False), unpack(k_codes, operand, along_tokens=False)
        if v_codes is not None:
            v, v_kept = unpack(v_codes, operand, along_tokens=True), None
        else:
            assert value is not None, "V is read again"
            v, v_kept = _value_operands(value, problem, allowed)
        constants = {**problem.constants, **problem.options, "HAS_KEY_MASK": allowed is not None, "ROTATE": spec.rotate}
        constants["SAGE"] = smoothed is not None
        mean_scores = None if smoothed is None else smoothed.scores
        chosen = _tiles(device, problem)
        block_m = max(16, 2048 // problem.block_d)
        num_blocks = side.blocks(block_m)
        preprocess_kernel[(side.batch * side.num_heads * num_blocks,)](
            grad_out, out_hp, stats, side.cu_seqlens, scaled_grad_out, grad_out_operand, delta,
            *strides_of(grad_out), *strides_of(out_hp),
            side.num_heads, side.max_seqlen, num_blocks, side.rows, side.all_rows,
            HEAD_DIM=problem.head_dim, BLOCK_D=problem.block_d, BLOCK_M=block_m, VARLEN=packing is not None,
            STORE_GRAD_OUT=kept, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        pointers = (*key_mask_pointers(allowed), side.cu_seqlens, problem.key.cu_seqlens)

        def numbers(out: torch.Tensor, num_blocks: int, softmax_scale: float) -> tuple[int | float, ...]:
            sizes = (*problem.sizes, num_blocks, side.rows, problem.key.rows, side.all_rows)
            return (*strides_of(out)[:3], key_mask_stride(allowed), *sizes, problem.softmax_scale_log2, softmax_scale)

        tile = chosen.grad_query
        num_blocks = side.blocks(tile.block_m)
        if smoothed is not None:
            grad_sums = grad_query.new_zeros(
                (side.batch, side.num_heads, num_blocks, problem.key.max_seqlen), dtype=torch.float32
            )
        grad_query_kernel[(side.batch * side.num_heads * num_blocks,)](
            *descriptors([q, k, v, v_kept], [tile.block_m, tile.block_n, tile.block_n, tile.block_n]), *pointers,
            mean_scores, grad_sums, *bound_pointers(bounds), grad_out, delta, stats, grad_query,
            bounds_stride(bounds), *strides_of(grad_out),
            *numbers(grad_query, num_blocks, math.copysign(problem.softmax_scale, scale)),
            **constants, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        tile = chosen.grad_key_value
        # Where groups are kept, the first block ends with the sink group, which ends PAD slots.
        num_blocks = problem.key.blocks(tile.block_n) - (PAD // tile.block_n - 1 if kept else 0)
        rows = [tile.block_m, tile.block_n, tile.block_n, tile.block_m, tile.block_n, tile.block_m]
        grad_key_value_kernel[(problem.key.batch * problem.key.num_heads * num_blocks,)](
            *descriptors([q, k, v, scaled_grad_out, v_kept, grad_out_operand], rows), *pointers,
            mean_scores, *bound_pointers(bounds), delta, stats, grad_key, grad_value,
            bounds_stride(bounds), *numbers(grad_key, num_blocks, problem.softmax_scale),
            **constants, QUANTIZE_PV=spec.quantizes_pv,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if smoothed is not None and grad_sums is not None:
            tiles_of_block = SMOOTH_BLOCK // chosen.grad_query.block_m
            grad_sums = grad_sums.unflatten(2, (-1, tiles_of_block)).sum(3) * problem.softmax_scale
            grad_query = smoothing.grad_query(grad_query.float(), grad_sums, smoothed.key.float()).to(dtype)
            grad_key = smoothing.grad_key(grad_key.float(), grad_sums, smoothed.query_mean.float()).to(dtype)
        if sinks is not None:
            by_head = (1 if packing is not None else side.batch, side.num_heads, side.rows)
            shares = torch.exp2((sinks.float() * LOG2_E)[:, None] - stats[1].view(by_head))
            grad_sinks = -(shares * delta[0].view(by_head)).sum((0, 2)).to(sinks.dtype)
    return grad_query, grad_key, grad_value, grad_sinks


def fake_quantize_kv(
    key: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor | None, formats: Formats
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V fake-quantized, for attention that quantizes nothing else (`operands.fake_quantize_kv`).

    Raises:
        ValueError: the tensors are not on an NVIDIA GPU from sm_80 on.
    """
    check_device(key.device)
    with on_device(key.device):
        return operands.fake_quantize_kv(key, value, key_mask, formats)


def _value_operands(
    value: torch.Tensor, problem: Problem, allowed: AllowedKeys | None, order: int = 0, *, codes: Codes | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """V as the spec has it, and where groups are kept V as it is."""
    how = problem.spec.formats.value
    quantized = how is not None
    operand, *kept = quantize_tokens(
        value, problem.key, allowed=allowed, quantized=quantized, unquantized=not quantized or problem.key.lead > 0,
        order=order, **problem.rounding(how), codes=codes,
    )  # fmt: skip
    return operand, kept[0] if kept else None


def _tiles(device: torch.device, problem: Problem) -> tiles.Tiles:
    return tiles.choose(arch_of(device), problem.head_dim, problem.causal, problem.variants)


def remark(device: torch.device) -> str:
    """What `explain` adds about the installed Triton on this GPU: a phrase in brackets, or nothing."""
    arch = arch_of(device)
    if tiles.entry_of(arch) not in tiles.SPILLS.get(TRITON, ()):
        return ""
    return f" (slower than they could be: Triton {'.'.join(map(str, TRITON))} spills registers on sm_{arch}, 3.8 does not)"
