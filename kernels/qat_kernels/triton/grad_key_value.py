"""dK and dV of docs/NUMERICS.md, section 5, as a Triton kernel; preprocess.py has what the backward is made of."""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import SMOOTH_BLOCK, first_row, mean_scores_row, sequence
from .nvfp4 import GROUP, P_GLOBAL_SCALE, cast_rn, dot, fake_quantize_p, hadamard
from .scores import LOG2_E, add_key_bias, first_query_to_see, queries_that_reach, seen_slots, soft_cap


@triton.jit
def _add_grad_key(
    grad_key, grad_bias, p, scores, q, v, grad_out, delta, zeros, KEY_BIAS: tl.constexpr, SOFTCAP: tl.constexpr
):  # fmt: skip
    """Add dS^T QF of a tile of queries, and with KEY_BIAS sums of dS: dS = P (dP - delta), and the derivative of the soft cap."""
    grad_scores = p * (dot(v, tl.trans(grad_out), zeros) - delta[None, :])
    if SOFTCAP > 0:
        grad_scores *= 1.0 - scores * scores
    if KEY_BIAS:
        grad_bias += tl.sum(grad_scores, 1)
    return dot(cast_rn(grad_scores, q.dtype), q, grad_key), grad_bias


@triton.jit
def _sum_grad_key_value(
    grad_key, grad_value, grad_bias, k, v, key_bias, slot, present, q_desc, grad_out_desc, mean_scores_ptr, stats_ptr, delta_ptr,
    q_row, q_rows, qheads_per_kvhead, seqlen_q, q_pos_offset, slots, leftpad, lower_ptr, upper_ptr, start, stop,
    softmax_scale_log2,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, CHECK_BOUNDS: tl.constexpr,
    QUANTIZE_PV: tl.constexpr, KEY_BIAS: tl.constexpr, SAGE: tl.constexpr,
    LEAD: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr, PREFIX: tl.constexpr,
    BOUNDED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dS^T QF (KEY) and PF~^T (dO / l) (VALUE) over the queries from `start` to `stop`, of all heads that share the keys.

    Scores are [keys, queries]. With CHECK_BOUNDS and CAUSAL a key is seen by the queries behind its group (QUANTIZE_PV), or by
    all from itself on; with MASKED as `seen_slots` says. grad_out: dO / l. With KEY_BIAS key_bias is added to the scores, and
    `grad_bias` takes the sums of dS over the queries.
    """
    zeros = tl.zeros((k.shape[0], BLOCK_M), tl.float32)
    score_scale_log2 = softmax_scale_log2
    if SOFTCAP > 0:
        score_scale_log2 = softmax_scale_log2 * 0.0 + SOFTCAP * LOG2_E
    tile = tl.arange(0, BLOCK_M)
    num_blocks = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_M)
    # One loop over heads and blocks: nested, they would start the pipeline again for each head.
    first_query = start
    for _ in range(qheads_per_kvhead * num_blocks):
        row = q_row + first_query
        q, grad_out = q_desc.load([row, 0]), grad_out_desc.load([row, 0])
        row_max, delta = tl.load(stats_ptr + row + tile), tl.load(delta_ptr + row + tile)
        scores = dot(k, tl.trans(q), zeros)
        if KEY_BIAS:
            scores = add_key_bias(scores, key_bias[:, None])
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
        if VALUE:
            p_fq = p
            if QUANTIZE_PV:
                groups = tl.reshape(p, (k.shape[0] // GROUP, GROUP, BLOCK_M))
                groups = fake_quantize_p(groups, tl.max(groups, 1, keep_dims=True), SAGE)
                p_fq = tl.reshape(groups, (k.shape[0], BLOCK_M))
            grad_value = dot(cast_rn(p_fq, q.dtype), grad_out, grad_value)
        if KEY:
            grad_key, grad_bias = _add_grad_key(
                grad_key, grad_bias, p, scores, q, v, grad_out, delta, zeros, KEY_BIAS, SOFTCAP
            )  # fmt: skip
        is_last = first_query + BLOCK_M >= stop  # of this head
        first_query = tl.where(is_last, start, first_query + BLOCK_M)
        q_row = tl.where(is_last, q_row + q_rows, q_row)
    return grad_key, grad_value, grad_bias


@triton.jit
def _sum_grad_key_value_kept(
    grad_key, grad_value, grad_bias, k, v, key_bias, slot, present, q_desc, grad_out_desc, stats_ptr, delta_ptr,
    q_row, q_rows, qheads_per_kvhead, seqlen_q, q_pos_offset, slots, leftpad, lower_ptr, upper_ptr, group_mask, start, stop,
    softmax_scale_log2, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_M: tl.constexpr, LEAD: tl.constexpr,
    KEY_BIAS: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr, PREFIX: tl.constexpr,
    BOUNDED: tl.constexpr, SOFTCAP: tl.constexpr,
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
    first_query = start
    for _ in range(qheads_per_kvhead * num_blocks):
        row = q_row + first_query
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
        if KEY_BIAS:
            scores = add_key_bias(scores, key_bias[:, None])
        if SOFTCAP > 0:
            scores = soft_cap(scores, softmax_scale_log2, SOFTCAP)
        p = tl.exp2(scores * score_scale_log2 - lse_log2[None, :])
        p = tl.where(allowed, p, 0.0)
        if VALUE:
            grad_value = dot(cast_rn(p, q.dtype), grad_out, grad_value)
        if KEY:
            grad_key, grad_bias = _add_grad_key(
                grad_key, grad_bias, p, scores, q, v, grad_out, delta, zeros, KEY_BIAS, SOFTCAP
            )  # fmt: skip
        is_last = first_query + BLOCK_M >= stop  # of this head
        first_query = tl.where(is_last, start, first_query + BLOCK_M)
        q_row = tl.where(is_last, q_row + q_rows, q_row)
    return grad_key, grad_value, grad_bias


@triton.jit
def grad_key_value_kernel(
    q_desc, k_desc, v_desc, scaled_grad_out_desc, v_kept_desc, grad_out_desc,
    key_mask_ptr, leftpad_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    key_bias_ptr, q_shift_ptr, mean_scores_ptr, lower_ptr, upper_ptr, delta_ptr, stats_ptr, grad_key_ptr, grad_value_ptr,
    bounds_stride, out_rows_b, out_rows_h, out_rows_l, key_mask_stride,
    num_heads, num_heads_k, seqlen_q, seqlen_k, num_blocks, q_rows, k_rows, all_q_rows, softmax_scale_log2, softmax_scale, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEAD: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, VARLEN: tl.constexpr, QUANTIZE_PV: tl.constexpr, ROTATE: tl.constexpr,
    KEY_BIAS: tl.constexpr, SAGE: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PREFIX: tl.constexpr, BOUNDED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N slots of one key head, summed over the query heads that share them.

    Layouts as in `grad_query_kernel`; scaled_grad_out: dO / l; out_rows: strides of dK and dV, in rows. Where groups are kept,
    block 0 has the sink group, for all of whose queries P and V (v_kept) are not quantized. Excluded keys are not written.
    Without grad_key_ptr dK is not computed, and without grad_value_ptr dV is not. q_shift float32 [num_heads_k, HEAD_DIM] and
    `scale`, that of the caller, with its sign: for the part of dK that comes from key_bias (KEY_BIAS).
    """
    KEPT: tl.constexpr = LEAD > 0
    KEY: tl.constexpr = grad_key_ptr is not None
    VALUE: tl.constexpr = grad_value_ptr is not None
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
    slot = first_slot + tl.arange(0, BLOCK_N)
    present = (slot >= LEAD) & (slot < slots)
    if HAS_KEY_MASK:
        present = present & (tl.load(key_mask_ptr + slot, mask=present, other=0) != 0)
    k, v = k_desc.load([k_row + first_slot, 0]), v_desc.load([k_row + first_slot, 0])
    batch, head_k = batch.to(tl.int64), head_k.to(tl.int64)

    if SAGE:
        mean_scores_ptr += mean_scores_row(batch * num_heads + head_k, 0, seqlen_q) * slots
    grad_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_value = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    grad_bias = 0
    key_bias = 0
    if KEY_BIAS:
        grad_bias = tl.zeros((BLOCK_N,), tl.float32)
        key_bias = tl.load(key_bias_ptr + k_row + slot)
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
    if KEPT:  # in a branch, ptxas would make the products wait for each other
        kept_until = tl.where(block == 0, until, kept_until)
        until = tl.where(block == 0, 0, until)
        full_until = tl.where(block == 0, 0, full_until)
    grad_key, grad_value, grad_bias = _sum_grad_key_value(
        grad_key, grad_value, grad_bias, k, v, key_bias, slot, present, q_desc, scaled_grad_out_desc, mean_scores_ptr,
        stats_ptr, delta_ptr + all_q_rows, q_row, q_rows, qheads_per_kvhead, seqlen_q, q_pos_offset, slots, leftpad,
        lower_ptr, upper_ptr, begin, tl.minimum(full, until),
        softmax_scale_log2, KEY, VALUE, BLOCK_M, CAUSAL, True, QUANTIZE_PV, KEY_BIAS, SAGE,
        LEAD, MASKED, WINDOW, BLOCK_SIZE, PREFIX, BOUNDED, SOFTCAP,
    )  # fmt: skip
    if MASKED and not HAS_KEY_MASK:
        full_until = full + tl.maximum(full_until - full, 0) // BLOCK_M * BLOCK_M
    if not HAS_KEY_MASK:
        grad_key, grad_value, grad_bias = _sum_grad_key_value(
            grad_key, grad_value, grad_bias, k, v, key_bias, slot, present, q_desc, scaled_grad_out_desc, mean_scores_ptr,
            stats_ptr, delta_ptr + all_q_rows, q_row, q_rows, qheads_per_kvhead, seqlen_q, q_pos_offset, slots, leftpad,
            lower_ptr, upper_ptr, full, full_until,
            softmax_scale_log2, KEY, VALUE, BLOCK_M, CAUSAL, False, QUANTIZE_PV, KEY_BIAS, SAGE,
            LEAD, MASKED, WINDOW, BLOCK_SIZE, PREFIX, BOUNDED, SOFTCAP,
        )  # fmt: skip
    if MASKED and not HAS_KEY_MASK:
        grad_key, grad_value, grad_bias = _sum_grad_key_value(
            grad_key, grad_value, grad_bias, k, v, key_bias, slot, present, q_desc, scaled_grad_out_desc, mean_scores_ptr,
            stats_ptr, delta_ptr + all_q_rows, q_row, q_rows, qheads_per_kvhead, seqlen_q, q_pos_offset, slots, leftpad,
            lower_ptr, upper_ptr, full_until, until,
            softmax_scale_log2, KEY, VALUE, BLOCK_M, CAUSAL, True, QUANTIZE_PV, KEY_BIAS, SAGE,
            LEAD, MASKED, WINDOW, BLOCK_SIZE, PREFIX, BOUNDED, SOFTCAP,
        )  # fmt: skip
    if QUANTIZE_PV:
        grad_value *= 1.0 / P_GLOBAL_SCALE
    if KEPT:
        v = v_kept_desc.load([k_row + first_slot, 0])
        grad_key, grad_value, grad_bias = _sum_grad_key_value_kept(
            grad_key, grad_value, grad_bias, k, v, key_bias, slot, present, q_desc, grad_out_desc, stats_ptr + all_q_rows,
            delta_ptr, q_row, q_rows, qheads_per_kvhead, seqlen_q, q_pos_offset, slots, leftpad, lower_ptr, upper_ptr,
            tl.where(block == 0, 0, -GROUP), kept_from, kept_until, softmax_scale_log2, KEY, VALUE, BLOCK_M,
            LEAD, KEY_BIAS, MASKED, WINDOW, BLOCK_SIZE, PREFIX, BOUNDED, SOFTCAP,
        )  # fmt: skip

    rows = batch * out_rows_b + head_k * out_rows_h + (k_start + leftpad + slot - LEAD).to(tl.int64) * out_rows_l
    if KEY:
        if ROTATE:
            grad_key = hadamard(grad_key, BLOCK_N, BLOCK_D)
        grad_key *= softmax_scale
        columns = tl.arange(0, BLOCK_D)
        if KEY_BIAS:
            q_shift = tl.load(q_shift_ptr + head_k * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)
            grad_key += (grad_bias * scale)[:, None] * q_shift[None, :]
        tl.store(
            grad_key_ptr + rows[:, None] * HEAD_DIM + columns[None, :], cast_rn(grad_key, grad_key_ptr.dtype.element_ty),
            mask=present[:, None] & (columns < HEAD_DIM)[None, :],
        )  # fmt: skip
    if VALUE:
        columns = tl.arange(0, BLOCK_DV)
        tl.store(
            grad_value_ptr + rows[:, None] * HEAD_DIM_V + columns[None, :],
            cast_rn(grad_value, grad_value_ptr.dtype.element_ty),
            mask=present[:, None] & (columns < HEAD_DIM_V)[None, :],
        )  # fmt: skip
