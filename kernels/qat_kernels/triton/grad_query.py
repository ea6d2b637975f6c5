"""dQ of docs/NUMERICS.md, section 5, as a Triton kernel; preprocess.py has what the backward is made of."""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import first_row, mean_scores_row, sequence, slot_ranges
from .nvfp4 import GROUP, cast_rn, dot, hadamard
from .scores import LOG2_E, add_key_bias, holds_an_open_group, masked_slot_ranges, soft_cap


@triton.jit
def _sum_grad_query(
    grad_query, q, grad_out, delta, lse_log2,
    k_desc, v_desc, k_row, key_mask_ptr, key_bias_ptr, mean_scores_ptr, grad_sums_ptr, upper, lower, prefix_stop, start, stop,
    softmax_scale_log2,
    BLOCK_N: tl.constexpr, CHECK_BOUNDS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, KEY_BIAS: tl.constexpr, SAGE: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dS KF over the slots from `start` to `stop`; bounds, key_bias and mean_scores as in `forward._attend`.

    With SAGE grad_sums float32 [slots] takes the sums of dS over the rows of the tile.
    """
    zeros = tl.zeros((q.shape[0], BLOCK_N), tl.float32)
    score_scale_log2 = softmax_scale_log2
    if SOFTCAP > 0:
        score_scale_log2 = softmax_scale_log2 * 0.0 + SOFTCAP * LOG2_E
    for first_slot in range(start, stop, BLOCK_N):
        k = k_desc.load([k_row + first_slot, 0])
        v = v_desc.load([k_row + first_slot, 0])
        scores = dot(q, tl.trans(k), zeros)
        if KEY_BIAS:
            scores = add_key_bias(scores, tl.load(key_bias_ptr + (first_slot + tl.arange(0, BLOCK_N)))[None, :])
        if SOFTCAP > 0:
            scores = soft_cap(scores, softmax_scale_log2, SOFTCAP)
        slot = first_slot + tl.arange(0, BLOCK_N)
        if SAGE:
            scores += tl.load(mean_scores_ptr + slot, mask=slot < stop)[None, :]
        p = tl.exp2(scores * score_scale_log2 - lse_log2[:, None])
        if CHECK_BOUNDS:
            allowed = slot[None, :] < upper[:, None]
            if MASKED:
                allowed = allowed & ((slot[None, :] >= lower[:, None]) | (slot < prefix_stop)[None, :])
            if HAS_KEY_MASK:
                allowed = allowed & (tl.load(key_mask_ptr + slot) != 0)[None, :]
            p = tl.where(allowed, p, 0.0)
        grad_scores = p * (dot(grad_out, tl.trans(v), zeros) - delta[:, None])
        if SOFTCAP > 0:
            grad_scores *= 1.0 - scores * scores
        if SAGE:
            tl.store(grad_sums_ptr + slot, tl.sum(grad_scores, 0), mask=slot < stop)
        grad_query = dot(cast_rn(grad_scores, k.dtype), k, grad_query)
    return grad_query


@triton.jit
def _sum_grad_query_kept(
    grad_query, q, grad_out, delta, lse_log2,
    k_desc, v_desc, k_row, key_mask_ptr, key_bias_ptr, last, lower, prefix_stop, slots, start, first_block, num_blocks,
    softmax_scale_log2, BLOCK_N: tl.constexpr, LEAD: tl.constexpr, HAS_KEY_MASK: tl.constexpr, KEY_BIAS: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The kept groups, where dP = dO V^T: the same steps as in `forward._attend_kept`."""
    zeros = tl.zeros((q.shape[0], BLOCK_N), tl.float32)
    score_scale_log2 = softmax_scale_log2
    if SOFTCAP > 0:
        score_scale_log2 = softmax_scale_log2 * 0.0 + SOFTCAP * LOG2_E
    for block in range(first_block, num_blocks + 1):
        first_slot = tl.where(block == 0, LEAD + GROUP - BLOCK_N, start + (block - 1) * BLOCK_N)
        needed = True
        if MASKED:
            needed = (block == 0) | holds_an_open_group(last, first_slot, BLOCK_N)
        if needed:
            kept_from = tl.where(block == 0, LEAD, tl.maximum(last & -GROUP, LEAD + GROUP))
            slot = first_slot + tl.arange(0, BLOCK_N)
            k, v = k_desc.load([k_row + first_slot, 0]), v_desc.load([k_row + first_slot, 0])
            present = slot < slots
            if HAS_KEY_MASK:
                present = present & (tl.load(key_mask_ptr + slot) != 0)
            allowed = (slot[None, :] >= kept_from[:, None]) & (slot[None, :] <= last[:, None]) & present[None, :]
            if MASKED:
                allowed = allowed & ((slot[None, :] >= lower[:, None]) | (slot < prefix_stop)[None, :])
            scores = dot(q, tl.trans(k), zeros)
            if KEY_BIAS:
                scores = add_key_bias(scores, tl.load(key_bias_ptr + slot)[None, :])
            if SOFTCAP > 0:
                scores = soft_cap(scores, softmax_scale_log2, SOFTCAP)
            p = tl.exp2(scores * score_scale_log2 - lse_log2[:, None])
            p = tl.where(allowed, p, 0.0)
            grad_scores = p * (dot(grad_out, tl.trans(v), zeros) - delta[:, None])
            if SOFTCAP > 0:
                grad_scores *= 1.0 - scores * scores
            grad_query = dot(cast_rn(grad_scores, k.dtype), k, grad_query)
    return grad_query


@triton.jit
def grad_query_kernel(
    q_desc, k_desc, v_desc, v_kept_desc, key_mask_ptr, leftpad_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    key_bias_ptr, mean_scores_ptr, grad_sums_ptr, lower_ptr, upper_ptr, grad_out_ptr, delta_ptr, stats_ptr, grad_query_ptr,
    bounds_stride, grad_out_stride_b, grad_out_stride_h, grad_out_stride_l, grad_out_stride_d,
    out_stride_b, out_stride_h, out_stride_l, key_mask_stride,
    num_heads, num_heads_k, seqlen_q, seqlen_k, num_blocks, q_rows, k_rows, all_q_rows, softmax_scale_log2, softmax_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEAD: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, VARLEN: tl.constexpr, ROTATE: tl.constexpr, KEY_BIAS: tl.constexpr, SAGE: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr, PREFIX: tl.constexpr, BOUNDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries of one head. Layouts as in `forward.attention_forward_kernel`; grad_out is dO in any layout.

    grad_sums float32 [B, H, num_blocks, Lk] (SAGE): dS summed over the BLOCK_M queries, without the scale of the scores.
    """
    KEPT: tl.constexpr = LEAD > 0
    batch_head, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    if CAUSAL:  # the longest first
        block = num_blocks - 1 - block
    batch, head = batch_head // num_heads, batch_head % num_heads
    head_k = head // (num_heads // num_heads_k)
    q_start, seqlen_q = sequence(cu_seqlens_q_ptr, batch, seqlen_q, VARLEN)
    k_start, seqlen_k = sequence(cu_seqlens_k_ptr, batch, seqlen_k, VARLEN)
    if block * BLOCK_M >= seqlen_q:
        return
    leftpad = 0
    if HAS_KEY_MASK:
        leftpad = tl.load(leftpad_ptr + batch)
        key_mask_ptr += batch.to(tl.int64) * key_mask_stride
    seqlen_k -= leftpad
    slots = seqlen_k + LEAD
    q_row = first_row(batch, head, num_heads, q_rows, q_start, 0, VARLEN) + block * BLOCK_M
    k_row = first_row(batch, head_k, num_heads_k, k_rows, k_start, LEAD, VARLEN)
    if KEY_BIAS:
        key_bias_ptr += k_row
    rows, columns = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside, columns_v = (rows < seqlen_q)[:, None], tl.arange(0, BLOCK_DV)
    q = q_desc.load([q_row, 0])
    tokens = (q_start + rows).to(tl.int64)[:, None]
    grad_out_ptr += batch.to(tl.int64) * grad_out_stride_b + head.to(tl.int64) * grad_out_stride_h
    grad_out_ptrs = grad_out_ptr + tokens * grad_out_stride_l + columns_v.to(tl.int64)[None, :] * grad_out_stride_d
    grad_out = cast_rn(tl.load(grad_out_ptrs, mask=inside & (columns_v < HEAD_DIM_V)[None, :], other=0.0), q.dtype)
    row_stats = q_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    delta, lse_log2 = tl.load(delta_ptr + row_stats), tl.load(stats_ptr + all_q_rows + row_stats)

    grad_query = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    lower = 0
    prefix_stop = 0
    first_block = 0
    if MASKED:
        if BOUNDED:
            lower_ptr += batch.to(tl.int64) * bounds_stride
            upper_ptr += batch.to(tl.int64) * bounds_stride
        last, upper, lower, prefix_stop, head_stop, first, begin, full, stop, open_start, first_block, open_blocks = (
            masked_slot_ranges(
                rows, block * BLOCK_M, seqlen_q, seqlen_k - seqlen_q + LEAD, slots, leftpad, lower_ptr, upper_ptr,
                LEAD, WINDOW, BLOCK_SIZE, PREFIX, BOUNDED, BLOCK_M, BLOCK_N,
            )
        )  # fmt: skip
        if PREFIX > 0:
            grad_query = _sum_grad_query(
                grad_query, q, grad_out, delta, lse_log2, k_desc, v_desc, k_row, key_mask_ptr, key_bias_ptr, mean_scores_ptr,
                grad_sums_ptr, upper, lower, prefix_stop, LEAD + GROUP if KEPT else 0, head_stop, softmax_scale_log2,
                BLOCK_N, True, HAS_KEY_MASK, KEY_BIAS, SAGE, MASKED, SOFTCAP,
            )  # fmt: skip
        if HAS_KEY_MASK:
            begin = first
        elif WINDOW > 0 or BOUNDED:
            grad_query = _sum_grad_query(
                grad_query, q, grad_out, delta, lse_log2, k_desc, v_desc, k_row, key_mask_ptr, key_bias_ptr, mean_scores_ptr,
                grad_sums_ptr, upper, lower, prefix_stop, first, tl.minimum(begin, stop), softmax_scale_log2,
                BLOCK_N, True, HAS_KEY_MASK, KEY_BIAS, SAGE, MASKED, SOFTCAP,
            )  # fmt: skip
    else:
        last, upper, begin, full, stop, open_start, open_blocks = slot_ranges(
            rows, block * BLOCK_M, seqlen_k - seqlen_q + LEAD, slots, LEAD, CAUSAL, BLOCK_M, BLOCK_N
        )  # fmt: skip
    if SAGE:
        mean_scores_ptr += mean_scores_row(batch_head, block * BLOCK_M, seqlen_q) * seqlen_k
        grad_sums_ptr += (batch_head.to(tl.int64) * num_blocks + block) * seqlen_k
    if HAS_KEY_MASK:
        full = begin
    else:
        grad_query = _sum_grad_query(
            grad_query, q, grad_out, delta, lse_log2, k_desc, v_desc, k_row, key_mask_ptr, key_bias_ptr, mean_scores_ptr,
            grad_sums_ptr, upper, lower, prefix_stop, begin, full, softmax_scale_log2,
            BLOCK_N, False, False, KEY_BIAS, SAGE, MASKED, SOFTCAP,
        )  # fmt: skip
    grad_query = _sum_grad_query(
        grad_query, q, grad_out, delta, lse_log2, k_desc, v_desc, k_row, key_mask_ptr, key_bias_ptr, mean_scores_ptr,
        grad_sums_ptr, upper, lower, prefix_stop, full, stop, softmax_scale_log2,
        BLOCK_N, True, HAS_KEY_MASK, KEY_BIAS, SAGE, MASKED, SOFTCAP,
    )  # fmt: skip
    if KEPT:
        grad_query = _sum_grad_query_kept(
            grad_query, q, grad_out, delta, lse_log2, k_desc, v_kept_desc, k_row, key_mask_ptr, key_bias_ptr, last, lower,
            prefix_stop, slots, open_start, first_block, open_blocks, softmax_scale_log2,
            BLOCK_N, LEAD, HAS_KEY_MASK, KEY_BIAS, MASKED, SOFTCAP,
        )  # fmt: skip

    if ROTATE:
        grad_query = hadamard(grad_query, BLOCK_M, BLOCK_D)
    grad_query *= softmax_scale
    grad_query_ptr += batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    grad_query = cast_rn(grad_query, grad_query_ptr.dtype.element_ty)
    tl.store(grad_query_ptr + tokens * out_stride_l + columns[None, :], grad_query, mask=inside & (columns < HEAD_DIM)[None, :])
