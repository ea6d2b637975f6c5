"""The backward of docs/NUMERICS.md, section 5, as three Triton kernels: row sums, dQ and dK/dV.

The reference is qat_kernels/reference.py.

Every gradient is summed by one program in a fixed order: the same bits in every run. P and P~ are recomputed from the quantized
Q and K and the row statistics of the forward (forward.py), so P~ is quantized on the grid that the forward used. dQ needs P
alone; only dV sees the quantized one.

Operands are in the layout of layout.py, but slots in their own order: here a group lies in the rows of a matrix unit's
accumulator, or is not needed. With l, the row sum of P~,
    dV = PF~^T (dO / l)    and    dS = P~ (dO / l V^T - D / l),
so dK/dV reads the scaled gradient dO / l in place of dO (an operand too, bfloat16) and divides no probability. D of that kernel
is the row sum of O' and the rounded dO / l, so that the rows of dS sum to zero as exactly as with dO itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import PAD, SMOOTH_BLOCK, first_row, mean_scores_row, sequence, slot_ranges
from .nvfp4 import GROUP, P_GLOBAL_SCALE, cast_rn, dot, fake_quantize_p, hadamard
from .scores import (
    LOG2_E,
    first_query_to_see,
    holds_an_open_group,
    masked_slot_ranges,
    queries_that_reach,
    seen_slots,
    soft_cap,
)

_PAD = tl.constexpr(PAD)


@triton.jit
def preprocess_kernel(
    grad_out_ptr, out_hp_ptr, stats_ptr, cu_seqlens_q_ptr, scaled_grad_out_ptr, grad_out_operand_ptr, delta_ptr,
    grad_out_stride_b, grad_out_stride_h, grad_out_stride_l, grad_out_stride_d,
    out_hp_stride_b, out_hp_stride_h, out_hp_stride_l, out_hp_stride_d,
    num_heads, seqlen_q, num_blocks, q_rows, all_q_rows,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, VARLEN: tl.constexpr, STORE_GRAD_OUT: tl.constexpr,
):  # fmt: skip
    """dO / l as an operand, and with STORE_GRAD_OUT dO too; delta float32 [2, all_q_rows]: D, from dO and from dO / l.

    grad_out, out_hp: dO and O' in any layout; stats as `forward.attention_forward_kernel` leaves them.
    """
    batch_head, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    batch, head = batch_head // num_heads, batch_head % num_heads
    start, seqlen_q = sequence(cu_seqlens_q_ptr, batch, seqlen_q, VARLEN)
    if block * BLOCK_M >= tl.cdiv(seqlen_q, _PAD) * _PAD:
        return
    rows, columns = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    where = (rows < seqlen_q)[:, None] & (columns < HEAD_DIM)[None, :]
    token, column = (start + rows).to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    grad_out_ptr += batch * grad_out_stride_b + head * grad_out_stride_h
    out_hp_ptr += batch * out_hp_stride_b + head * out_hp_stride_h
    grad_out_ptrs = grad_out_ptr + token * grad_out_stride_l + column * grad_out_stride_d
    grad_out = tl.load(grad_out_ptrs, mask=where, other=0.0).to(tl.float32)
    out_hp = tl.load(out_hp_ptr + token * out_hp_stride_l + column * out_hp_stride_d, mask=where, other=0.0).to(tl.float32)
    row = first_row(batch, head, num_heads, q_rows, start, 0, VARLEN) + rows
    row_max, lse_log2 = tl.load(stats_ptr + row), tl.load(stats_ptr + all_q_rows + row)
    inv_row_sum = tl.where(row_max == float("inf"), 0.0, tl.exp2(row_max - lse_log2))  # 1 / l
    scaled_grad_out = cast_rn(grad_out * inv_row_sum[:, None], scaled_grad_out_ptr.dtype.element_ty)
    tl.store(scaled_grad_out_ptr + row[:, None] * BLOCK_D + columns[None, :], scaled_grad_out)
    if STORE_GRAD_OUT:
        rounded = cast_rn(grad_out, grad_out_operand_ptr.dtype.element_ty)
        tl.store(grad_out_operand_ptr + row[:, None] * BLOCK_D + columns[None, :], rounded)
    tl.store(delta_ptr + row, tl.sum(grad_out * out_hp, 1))
    tl.store(delta_ptr + all_q_rows + row, tl.sum(scaled_grad_out.to(tl.float32) * out_hp, 1))


@triton.jit
def _sum_grad_query(
    grad_query, q, grad_out, delta, lse_log2,
    k_desc, v_desc, k_row, key_mask_ptr, mean_scores_ptr, grad_sums_ptr, upper, lower, prefix_stop, start, stop,
    softmax_scale_log2,
    BLOCK_N: tl.constexpr, CHECK_BOUNDS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, SAGE: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dS KF over the slots from `start` to `stop`; bounds and mean_scores as in `forward._attend`.

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
    k_desc, v_desc, k_row, key_mask_ptr, last, lower, prefix_stop, slots, start, first_block, num_blocks, softmax_scale_log2,
    BLOCK_N: tl.constexpr, LEAD: tl.constexpr, HAS_KEY_MASK: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
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
    mean_scores_ptr, grad_sums_ptr, lower_ptr, upper_ptr, grad_out_ptr, delta_ptr, stats_ptr, grad_query_ptr,
    bounds_stride, grad_out_stride_b, grad_out_stride_h, grad_out_stride_l, grad_out_stride_d,
    out_stride_b, out_stride_h, out_stride_l, key_mask_stride,
    num_heads, num_heads_k, seqlen_q, seqlen_k, num_blocks, q_rows, k_rows, all_q_rows, softmax_scale_log2, softmax_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEAD: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, VARLEN: tl.constexpr, ROTATE: tl.constexpr, SAGE: tl.constexpr,
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
    rows, columns = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    where = (rows < seqlen_q)[:, None] & (columns < HEAD_DIM)[None, :]
    q = q_desc.load([q_row, 0])
    tokens = (q_start + rows).to(tl.int64)[:, None]
    grad_out_ptr += batch.to(tl.int64) * grad_out_stride_b + head.to(tl.int64) * grad_out_stride_h
    grad_out_ptrs = grad_out_ptr + tokens * grad_out_stride_l + columns.to(tl.int64)[None, :] * grad_out_stride_d
    grad_out = cast_rn(tl.load(grad_out_ptrs, mask=where, other=0.0), q.dtype)
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
                grad_query, q, grad_out, delta, lse_log2, k_desc, v_desc, k_row, key_mask_ptr, mean_scores_ptr, grad_sums_ptr,
                upper, lower, prefix_stop, LEAD + GROUP if KEPT else 0, head_stop, softmax_scale_log2,
                BLOCK_N, True, HAS_KEY_MASK, SAGE, MASKED, SOFTCAP,
            )  # fmt: skip
        if HAS_KEY_MASK:
            begin = first
        elif WINDOW > 0 or BOUNDED:
            grad_query = _sum_grad_query(
                grad_query, q, grad_out, delta, lse_log2, k_desc, v_desc, k_row, key_mask_ptr, mean_scores_ptr, grad_sums_ptr,
                upper, lower, prefix_stop, first, tl.minimum(begin, stop), softmax_scale_log2,
                BLOCK_N, True, HAS_KEY_MASK, SAGE, MASKED, SOFTCAP,
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
            grad_query, q, grad_out, delta, lse_log2, k_desc, v_desc, k_row, key_mask_ptr, mean_scores_ptr, grad_sums_ptr,
            upper, lower, prefix_stop, begin, full, softmax_scale_log2, BLOCK_N, False, False, SAGE, MASKED, SOFTCAP,
        )  # fmt: skip
    grad_query = _sum_grad_query(
        grad_query, q, grad_out, delta, lse_log2, k_desc, v_desc, k_row, key_mask_ptr, mean_scores_ptr, grad_sums_ptr,
        upper, lower, prefix_stop, full, stop, softmax_scale_log2, BLOCK_N, True, HAS_KEY_MASK, SAGE, MASKED, SOFTCAP,
    )  # fmt: skip
    if KEPT:
        grad_query = _sum_grad_query_kept(
            grad_query, q, grad_out, delta, lse_log2, k_desc, v_kept_desc, k_row, key_mask_ptr, last, lower, prefix_stop, slots,
            open_start, first_block, open_blocks, softmax_scale_log2, BLOCK_N, LEAD, HAS_KEY_MASK, MASKED, SOFTCAP,
        )  # fmt: skip

    grad_query *= softmax_scale
    if ROTATE:
        grad_query = hadamard(grad_query, BLOCK_M, BLOCK_D)
    grad_query_ptr += batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    grad_query = cast_rn(grad_query, grad_query_ptr.dtype.element_ty)
    tl.store(grad_query_ptr + tokens * out_stride_l + columns[None, :], grad_query, mask=where)


@triton.jit
def _sum_grad_key_value(
    grad_key, grad_value, k, v, slot, present, q_desc, grad_out_desc, mean_scores_ptr, stats_ptr, delta_ptr,
    q_row, q_rows, qheads_per_kvhead, seqlen_q, q_pos_offset, slots, leftpad, lower_ptr, upper_ptr, start, stop,
    softmax_scale_log2,
    BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, CHECK_BOUNDS: tl.constexpr, QUANTIZE_PV: tl.constexpr, SAGE: tl.constexpr,
    LEAD: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr, PREFIX: tl.constexpr,
    BOUNDED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dS^T QF and PF~^T (dO / l) over the queries from `start` to `stop`, of all heads that share the keys.

    Scores are [keys, queries]. With CHECK_BOUNDS and CAUSAL a key is seen by the queries behind its group (QUANTIZE_PV), or by
    all from itself on; with MASKED as `seen_slots` says. grad_out: dO / l.
    """
    zeros = tl.zeros((k.shape[0], BLOCK_M), tl.float32)
    score_scale_log2 = softmax_scale_log2
    if SOFTCAP > 0:
        score_scale_log2 = softmax_scale_log2 * 0.0 + SOFTCAP * LOG2_E
    tile = tl.arange(0, BLOCK_M)
    num_blocks = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_M)
    # One loop over heads and blocks: nested, they would start the pipeline anew for each head.
    for step in range(qheads_per_kvhead * num_blocks):
        first_query = start + step % num_blocks * BLOCK_M
        row = q_row + step // num_blocks * q_rows + first_query
        q, grad_out = q_desc.load([row, 0]), grad_out_desc.load([row, 0])
        row_max, delta = tl.load(stats_ptr + row + tile), tl.load(delta_ptr + row + tile)
        scores = dot(k, tl.trans(q), zeros)
        if SOFTCAP > 0:
            scores = soft_cap(scores, softmax_scale_log2, SOFTCAP)
        if SAGE:  # no query heads share a key head
            mean_scores = mean_scores_ptr + (first_query // SMOOTH_BLOCK).to(tl.int64) * slots + slot
            scores += tl.load(mean_scores, mask=slot < slots)[:, None]
        p = tl.exp2(scores * score_scale_log2 - row_max[None, :])
        if CHECK_BOUNDS:
            allowed = present[:, None]
            if MASKED:
                lower, last = seen_slots(
                    tl.minimum(first_query + tile, seqlen_q - 1), q_pos_offset, slots, leftpad, lower_ptr, upper_ptr,
                    LEAD, WINDOW, BLOCK_SIZE, PREFIX, BOUNDED,
                )  # fmt: skip
                allowed = allowed & (slot[:, None] < ((last & -GROUP) if QUANTIZE_PV else last + 1)[None, :])
                allowed = allowed & ((slot[:, None] >= lower[None, :]) | (slot < PREFIX + LEAD)[:, None])
            elif CAUSAL:
                q_pos = (first_query + tile + q_pos_offset)[None, :]
                allowed = allowed & (slot[:, None] < ((q_pos & -GROUP) if QUANTIZE_PV else q_pos + 1))
            p = tl.where(allowed, p, 0.0)
        p_fq = p
        if QUANTIZE_PV:
            groups = tl.reshape(p, (k.shape[0] // GROUP, GROUP, BLOCK_M))
            groups = fake_quantize_p(groups, tl.max(groups, 1, keep_dims=True), SAGE)
            p_fq = tl.reshape(groups, (k.shape[0], BLOCK_M))
        grad_value = dot(cast_rn(p_fq, q.dtype), grad_out, grad_value)
        grad_scores = p * (dot(v, tl.trans(grad_out), zeros) - delta[None, :])
        if SOFTCAP > 0:
            grad_scores *= 1.0 - scores * scores
        grad_key = dot(cast_rn(grad_scores, q.dtype), q, grad_key)
    return grad_key, grad_value


@triton.jit
def _sum_grad_key_value_kept(
    grad_key, grad_value, k, v, slot, present, q_desc, grad_out_desc, stats_ptr, delta_ptr,
    q_row, q_rows, qheads_per_kvhead, seqlen_q, q_pos_offset, slots, leftpad, lower_ptr, upper_ptr, group_mask, start, stop,
    softmax_scale_log2, BLOCK_M: tl.constexpr, LEAD: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PREFIX: tl.constexpr, BOUNDED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The same for kept groups: dS^T QF and P^T dO.

    Over the queries of a key's own group (`group_mask` -16), or over all behind it (0).

    With 1 / l inside P: a kept key may outweigh the others by more than float32 can hold beside their maximum.
    """
    zeros = tl.zeros((k.shape[0], BLOCK_M), tl.float32)
    score_scale_log2 = softmax_scale_log2
    if SOFTCAP > 0:
        score_scale_log2 = softmax_scale_log2 * 0.0 + SOFTCAP * LOG2_E
    tile = tl.arange(0, BLOCK_M)
    num_blocks = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_M)
    for step in range(qheads_per_kvhead * num_blocks):
        first_query = start + step % num_blocks * BLOCK_M
        row = q_row + step // num_blocks * q_rows + first_query
        q, grad_out = q_desc.load([row, 0]), grad_out_desc.load([row, 0])
        lse_log2, delta = tl.load(stats_ptr + row + tile), tl.load(delta_ptr + row + tile)
        if MASKED:
            lower, last = seen_slots(
                tl.minimum(first_query + tile, seqlen_q - 1), q_pos_offset, slots, leftpad, lower_ptr, upper_ptr,
                LEAD, WINDOW, BLOCK_SIZE, PREFIX, BOUNDED,
            )  # fmt: skip
            last = last[None, :]
        else:
            last = (first_query + tile + q_pos_offset)[None, :]
        allowed = present[:, None] & (slot[:, None] <= last) & (slot[:, None] >= (last & group_mask))
        if MASKED:
            allowed = allowed & ((slot[:, None] >= lower[None, :]) | (slot < PREFIX + LEAD)[:, None])
        scores = dot(k, tl.trans(q), zeros)
        if SOFTCAP > 0:
            scores = soft_cap(scores, softmax_scale_log2, SOFTCAP)
        p = tl.exp2(scores * score_scale_log2 - lse_log2[None, :])
        p = tl.where(allowed, p, 0.0)
        grad_value = dot(cast_rn(p, q.dtype), grad_out, grad_value)
        grad_scores = p * (dot(v, tl.trans(grad_out), zeros) - delta[None, :])
        if SOFTCAP > 0:
            grad_scores *= 1.0 - scores * scores
        grad_key = dot(cast_rn(grad_scores, q.dtype), q, grad_key)
    return grad_key, grad_value


@triton.jit
def grad_key_value_kernel(
    q_desc, k_desc, v_desc, scaled_grad_out_desc, v_kept_desc, grad_out_desc,
    key_mask_ptr, leftpad_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    mean_scores_ptr, lower_ptr, upper_ptr, delta_ptr, stats_ptr, grad_key_ptr, grad_value_ptr,
    bounds_stride, out_stride_b, out_stride_h, out_stride_l, key_mask_stride,
    num_heads, num_heads_k, seqlen_q, seqlen_k, num_blocks, q_rows, k_rows, all_q_rows, softmax_scale_log2, softmax_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEAD: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, VARLEN: tl.constexpr, QUANTIZE_PV: tl.constexpr, ROTATE: tl.constexpr,
    SAGE: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr, PREFIX: tl.constexpr,
    BOUNDED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N slots of one key head, summed over the query heads that share them.

    Layouts as in `grad_query_kernel`; scaled_grad_out: dO / l. Where groups are kept, block 0 has the sink group, for all of
    whose queries P and V (v_kept) are not quantized. Excluded keys are not written.
    """
    KEPT: tl.constexpr = LEAD > 0
    batch_head, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    batch, head_k = batch_head // num_heads_k, batch_head % num_heads_k
    q_start, seqlen_q = sequence(cu_seqlens_q_ptr, batch, seqlen_q, VARLEN)
    k_start, seqlen_k = sequence(cu_seqlens_k_ptr, batch, seqlen_k, VARLEN)
    leftpad = 0
    if HAS_KEY_MASK:
        leftpad = tl.load(leftpad_ptr + batch)
        key_mask_ptr += batch.to(tl.int64) * key_mask_stride
    seqlen_k -= leftpad
    slots = seqlen_k + LEAD
    q_pos_offset = slots - seqlen_q
    first_slot = block * BLOCK_N
    if KEPT:
        first_slot += LEAD + GROUP - BLOCK_N
    if first_slot >= slots:
        return
    qheads_per_kvhead = num_heads // num_heads_k
    q_row = first_row(batch, head_k * qheads_per_kvhead, num_heads, q_rows, q_start, 0, VARLEN)
    k_row = first_row(batch, head_k, num_heads_k, k_rows, k_start, LEAD, VARLEN)
    slot, columns = first_slot + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    present = (slot >= LEAD) & (slot < slots)
    if HAS_KEY_MASK:
        present = present & (tl.load(key_mask_ptr + slot, mask=present, other=0) != 0)
    k, v = k_desc.load([k_row + first_slot, 0]), v_desc.load([k_row + first_slot, 0])
    batch, head_k = batch.to(tl.int64), head_k.to(tl.int64)

    if SAGE:
        mean_scores_ptr += mean_scores_row(batch * num_heads + head_k, 0, seqlen_q) * slots
    grad_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_value = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    kept_from = 0
    kept_until = 0
    until = seqlen_q  # behind the last query that sees a slot
    full_until = seqlen_q  # behind the last that sees all of them
    if MASKED:
        if BOUNDED:
            lower_ptr += batch * bounds_stride
            upper_ptr += batch * bounds_stride
        until = queries_that_reach(
            tl.minimum(first_slot + BLOCK_N, slots) - 1, seqlen_q, q_pos_offset, leftpad, lower_ptr,
            LEAD, WINDOW, BLOCK_SIZE, PREFIX, BOUNDED,
        )  # fmt: skip
        full_until = queries_that_reach(
            first_slot, seqlen_q, q_pos_offset, leftpad, lower_ptr, LEAD, WINDOW, BLOCK_SIZE, 0, BOUNDED
        )  # fmt: skip
        if PREFIX > 0:
            until = tl.where(first_slot < PREFIX + LEAD, seqlen_q, until)
        if KEPT:
            kept_from = first_query_to_see(
                tl.maximum(first_slot, LEAD), seqlen_q, q_pos_offset, slots, leftpad, upper_ptr,
                LEAD, BLOCK_SIZE, PREFIX, BOUNDED,
            ) // BLOCK_M * BLOCK_M  # fmt: skip
            kept_until = first_query_to_see(
                first_slot + BLOCK_N, seqlen_q, q_pos_offset, slots, leftpad, upper_ptr, LEAD, BLOCK_SIZE, PREFIX, BOUNDED
            )  # fmt: skip
            kept_until = tl.minimum(kept_until, until)
    elif KEPT:
        kept_from = tl.maximum(first_slot - q_pos_offset, 0) // BLOCK_M * BLOCK_M
        kept_until = tl.minimum(tl.maximum(first_slot + BLOCK_N - q_pos_offset, 0), seqlen_q)
    if KEPT and block == 0:
        kept_until = until
    else:
        # Queries in [begin, full) see some of the slots, those from `full` on see all of them.
        begin = 0
        full = 0
        if MASKED:
            begin = first_query_to_see(
                first_slot + (GROUP if KEPT else 0), seqlen_q, q_pos_offset, slots, leftpad, upper_ptr,
                LEAD, BLOCK_SIZE, PREFIX, BOUNDED,
            ) // BLOCK_M * BLOCK_M  # fmt: skip
            full = first_query_to_see(
                first_slot + BLOCK_N - (0 if KEPT else 1), seqlen_q, q_pos_offset, slots, leftpad, upper_ptr,
                LEAD, BLOCK_SIZE, PREFIX, BOUNDED,
            )  # fmt: skip
        elif KEPT:
            begin = tl.maximum(first_slot + GROUP - q_pos_offset, 0) // BLOCK_M * BLOCK_M
            full = first_slot + BLOCK_N - q_pos_offset
        elif CAUSAL:
            begin = tl.maximum(first_slot - q_pos_offset, 0) // BLOCK_M * BLOCK_M
            full = first_slot + BLOCK_N - 1 - q_pos_offset
        # A last, shorter tile is bounded for everyone.
        full = seqlen_q if HAS_KEY_MASK else tl.where(slots < first_slot + BLOCK_N, seqlen_q, full)
        full = begin + tl.cdiv(tl.maximum(full - begin, 0), BLOCK_M) * BLOCK_M
        grad_key, grad_value = _sum_grad_key_value(
            grad_key, grad_value, k, v, slot, present, q_desc, scaled_grad_out_desc, mean_scores_ptr, stats_ptr,
            delta_ptr + all_q_rows, q_row, q_rows, qheads_per_kvhead, seqlen_q, q_pos_offset, slots, leftpad,
            lower_ptr, upper_ptr, begin, tl.minimum(full, until),
            softmax_scale_log2, BLOCK_M, CAUSAL, True, QUANTIZE_PV, SAGE,
            LEAD, MASKED, WINDOW, BLOCK_SIZE, PREFIX, BOUNDED, SOFTCAP,
        )  # fmt: skip
        if MASKED and not HAS_KEY_MASK:
            full_until = full + tl.maximum(full_until - full, 0) // BLOCK_M * BLOCK_M
        if not HAS_KEY_MASK:
            grad_key, grad_value = _sum_grad_key_value(
                grad_key, grad_value, k, v, slot, present, q_desc, scaled_grad_out_desc, mean_scores_ptr, stats_ptr,
                delta_ptr + all_q_rows, q_row, q_rows, qheads_per_kvhead, seqlen_q, q_pos_offset, slots, leftpad,
                lower_ptr, upper_ptr, full, full_until,
                softmax_scale_log2, BLOCK_M, CAUSAL, False, QUANTIZE_PV, SAGE,
                LEAD, MASKED, WINDOW, BLOCK_SIZE, PREFIX, BOUNDED, SOFTCAP,
            )  # fmt: skip
        if MASKED and not HAS_KEY_MASK:
            grad_key, grad_value = _sum_grad_key_value(
                grad_key, grad_value, k, v, slot, present, q_desc, scaled_grad_out_desc, mean_scores_ptr, stats_ptr,
                delta_ptr + all_q_rows, q_row, q_rows, qheads_per_kvhead, seqlen_q, q_pos_offset, slots, leftpad,
                lower_ptr, upper_ptr, full_until, until,
                softmax_scale_log2, BLOCK_M, CAUSAL, True, QUANTIZE_PV, SAGE,
                LEAD, MASKED, WINDOW, BLOCK_SIZE, PREFIX, BOUNDED, SOFTCAP,
            )  # fmt: skip
    if QUANTIZE_PV:
        grad_value *= 1.0 / P_GLOBAL_SCALE
    if KEPT:
        v = v_kept_desc.load([k_row + first_slot, 0])
        grad_key, grad_value = _sum_grad_key_value_kept(
            grad_key, grad_value, k, v, slot, present, q_desc, grad_out_desc, stats_ptr + all_q_rows, delta_ptr,
            q_row, q_rows, qheads_per_kvhead, seqlen_q, q_pos_offset, slots, leftpad, lower_ptr, upper_ptr,
            tl.where(block == 0, 0, -GROUP), kept_from, kept_until, softmax_scale_log2, BLOCK_M,
            LEAD, MASKED, WINDOW, BLOCK_SIZE, PREFIX, BOUNDED, SOFTCAP,
        )  # fmt: skip

    grad_key *= softmax_scale
    if ROTATE:
        grad_key = hadamard(grad_key, BLOCK_N, BLOCK_D)
    where = present[:, None] & (columns < HEAD_DIM)[None, :]
    offsets = batch * out_stride_b + head_k * out_stride_h
    offsets += (k_start + leftpad + slot - LEAD).to(tl.int64)[:, None] * out_stride_l + columns[None, :]
    tl.store(grad_key_ptr + offsets, cast_rn(grad_key, grad_key_ptr.dtype.element_ty), mask=where)
    tl.store(grad_value_ptr + offsets, cast_rn(grad_value, grad_value_ptr.dtype.element_ty), mask=where)
