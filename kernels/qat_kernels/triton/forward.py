"""The forward of docs/NUMERICS.md, sections 3 and 4, as one Triton kernel. The reference is qat_kernels/reference.py.

Q, K and V arrive quantized, in the layout of layout.py, and where groups are kept V as it is, too; P~ is quantized on the fly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import PAD, first_row, mean_scores_row, sequence, slot_of, slot_ranges, to_groups, to_tile
from .nvfp4 import GROUP, P_GLOBAL_SCALE, cast_rn, dot, fake_quantize_p, mul_sub
from .scores import LOG2_E, add_key_bias, holds_an_open_group, masked_slot_ranges, soft_cap

LN_2 = tl.constexpr(0.6931471805599453)
_PAD = tl.constexpr(PAD)


@triton.jit
def online_softmax_step(scores, row_max, row_sum, softmax_scale_log2, CHECK_BOUNDS: tl.constexpr, F32X2: tl.constexpr = False):
    """One step of the online softmax; scores as `to_groups` returns them.

    Returns P~ of these scores, the largest P~ of each group, and the new state of the rows.
    """
    p, group_max, row_max_safe, row_max_new = exponentials(scores, row_max, softmax_scale_log2, CHECK_BOUNDS, F32X2)
    row_sum = row_sum * tl.exp2(row_max - row_max_safe) + tl.sum(tl.sum(tl.sum(tl.sum(tl.sum(p, 5), 2), 3), 2), 1)
    return p, group_max, row_max_safe, row_max_new, row_sum


@triton.jit
def exponentials(scores, row_max, softmax_scale_log2, CHECK_BOUNDS: tl.constexpr, F32X2: tl.constexpr = False):
    """`online_softmax_step` without the sums.

    Maxima are rounded up, so that rescaling is by a power of two and leaves the codes of P~ as they were.
    """
    group_max = tl.max(tl.max(tl.max(scores, 5, keep_dims=True), 2, keep_dims=True), 4, keep_dims=True)
    tile_max = tl.max(tl.max(tl.max(tl.max(tl.max(group_max, 5), 4), 3), 2), 1)
    row_max_new = tl.maximum(row_max, tl.ceil(tile_max * softmax_scale_log2))
    row_max_safe = row_max_new
    if CHECK_BOUNDS:  # rows that have seen no key yet: everything is exp2(-inf) = 0
        row_max_safe = tl.where(row_max_new == float("-inf"), 0.0, row_max_new)
    p = tl.exp2(mul_sub(scores, softmax_scale_log2, row_max_safe[:, None, None, None, None, None], F32X2))
    group_max = tl.exp2(group_max * softmax_scale_log2 - row_max_safe[:, None, None, None, None, None])
    return p, group_max, row_max_safe, row_max_new


@triton.jit
def _attend(
    out, out_hp, row_sum, row_max,
    q, k_desc, v_desc, k_row, key_mask_ptr, key_bias_ptr, mean_scores_ptr, upper, lower, prefix_stop, start, stop,
    softmax_scale_log2,
    BLOCK_N: tl.constexpr, ORDER: tl.constexpr, CHECK_BOUNDS: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    QUANTIZE_PV: tl.constexpr, KEY_BIAS: tl.constexpr, SAGE: tl.constexpr, OUT_HP: tl.constexpr, MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The online softmax over the slots from `start` to `stop`, in tiles of BLOCK_N.

    With CHECK_BOUNDS a row may see those below `upper`, and with MASKED of these those from `lower` on and those below
    `prefix_stop`; otherwise all of them. With QUANTIZE_PV `out` is 2688 times too large
    and takes PF~ VF, while `out_hp` takes P~ VF; otherwise `out` takes the unquantized P~. With KEY_BIAS key_bias float32 [slots]
    is added to the scores of all rows, and with SAGE mean_scores.
    """
    score_scale_log2 = softmax_scale_log2
    if SOFTCAP > 0:
        score_scale_log2 = softmax_scale_log2 * 0.0 + SOFTCAP * LOG2_E
    for first_slot in range(start, stop, BLOCK_N):
        k = k_desc.load([k_row + first_slot, 0])
        scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32))
        if KEY_BIAS:
            key_bias = tl.load(key_bias_ptr + (first_slot + slot_of(tl.arange(0, BLOCK_N), ORDER)))
            scores = add_key_bias(scores, key_bias[None, :])
        if SOFTCAP > 0:
            scores = soft_cap(scores, softmax_scale_log2, SOFTCAP)
        slot = first_slot + slot_of(tl.arange(0, BLOCK_N), ORDER)
        if SAGE:
            scores += tl.load(mean_scores_ptr + slot, mask=slot < stop)[None, :]
        if CHECK_BOUNDS:
            allowed = slot[None, :] < upper[:, None]
            if MASKED:
                allowed = allowed & ((slot[None, :] >= lower[:, None]) | (slot < prefix_stop)[None, :])
            if HAS_KEY_MASK:
                allowed = allowed & (tl.load(key_mask_ptr + slot) != 0)[None, :]
            scores = tl.where(allowed, scores, float("-inf"))
        p, group_max, row_max_safe, row_max_new, row_sum = online_softmax_step(
            to_groups(scores, ORDER), row_max, row_sum, score_scale_log2, CHECK_BOUNDS
        )  # fmt: skip
        # Integer maxima seldom change: most tiles need no rescaling at all.
        if tl.max((row_max_new > row_max).to(tl.int32), 0) != 0:
            rescale = tl.exp2(row_max - row_max_safe)
            out = out * rescale[:, None]
            if OUT_HP:
                out_hp = out_hp * rescale[:, None]
        row_max = row_max_new
        v = v_desc.load([k_row + first_slot, 0])
        if OUT_HP:
            out_hp = dot(to_tile(cast_rn(p, v.dtype)), v, out_hp)
        if QUANTIZE_PV:
            p = fake_quantize_p(p, group_max, SAGE)
        out = dot(to_tile(cast_rn(p, v.dtype)), v, out)
    return out, out_hp, row_sum, row_max


@triton.jit
def _attend_kept(
    out, out_hp, row_sum, row_max,
    q, k_desc, v_desc, k_row, key_mask_ptr, key_bias_ptr, last, lower, prefix_stop, slots, start, first_block, num_blocks,
    softmax_scale_log2,
    BLOCK_N: tl.constexpr, ORDER: tl.constexpr, LEAD: tl.constexpr, HAS_KEY_MASK: tl.constexpr, KEY_BIAS: tl.constexpr,
    OUT_HP: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The kept groups, with unquantized P~ and V: the sink group, then the open groups in `num_blocks` tiles from `start` on.

    The open group of a row holds its `last` slot. first_block: 1 leaves out the sink group. With MASKED tiles without an open
    group are left out too, and `lower` and `prefix_stop` are as in `_attend`.
    """
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
            slot = first_slot + slot_of(tl.arange(0, BLOCK_N), ORDER)
            k = k_desc.load([k_row + first_slot, 0])
            scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32))
            if KEY_BIAS:
                scores = add_key_bias(scores, tl.load(key_bias_ptr + slot)[None, :])
            if SOFTCAP > 0:
                scores = soft_cap(scores, softmax_scale_log2, SOFTCAP)
            present = slot < slots
            if HAS_KEY_MASK:
                present = present & (tl.load(key_mask_ptr + slot) != 0)
            allowed = (slot[None, :] >= kept_from[:, None]) & (slot[None, :] <= last[:, None]) & present[None, :]
            if MASKED:
                allowed = allowed & ((slot[None, :] >= lower[:, None]) | (slot < prefix_stop)[None, :])
            scores = tl.where(allowed, scores, float("-inf"))
            p, _, row_max_safe, row_max_new, row_sum = online_softmax_step(
                to_groups(scores, ORDER), row_max, row_sum, score_scale_log2, True
            )  # fmt: skip
            rescale = tl.exp2(row_max - row_max_safe)
            row_max = row_max_new
            v = v_desc.load([k_row + first_slot, 0])
            p = to_tile(cast_rn(p, v.dtype))
            out = dot(p, v, out * rescale[:, None])
            if OUT_HP:
                out_hp = dot(p, v, out_hp * rescale[:, None])
    return out, out_hp, row_sum, row_max


@triton.jit
def attention_forward_kernel(
    q_desc, k_desc, v_desc, v_kept_desc, key_mask_ptr, leftpad_ptr, q_dot_k_shift_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    key_bias_ptr, mean_scores_ptr, lower_ptr, upper_ptr, sinks_ptr, out_ptr, out_hp_ptr, lse_ptr, stats_ptr,
    bounds_stride, out_stride_b, out_stride_h, out_stride_l, out_stride_d,
    lse_stride_b, lse_stride_h, key_mask_stride,
    num_heads, num_heads_k, seqlen_q, seqlen_k, num_blocks, q_rows, k_rows, all_q_rows, softmax_scale_log2, k_shift_scale,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ORDER: tl.constexpr,
    LEAD: tl.constexpr, CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, VARLEN: tl.constexpr, QUANTIZE_PV: tl.constexpr,
    KEY_BIAS: tl.constexpr, SAGE: tl.constexpr, OUT_HP: tl.constexpr, STORE_STATS: tl.constexpr, HAS_K_SHIFT: tl.constexpr,
    HAS_SINKS: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr, PREFIX: tl.constexpr,
    BOUNDED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head of one sequence.

    q, k, v, v_kept: operands (layout.py); v is quantized with QUANTIZE_PV, v_kept, for the kept groups, never. out, out_hp (O'):
    any strides, for packed sequences with batch stride 0. key_mask uint8, a row of k_rows for each sequence, by slot; leftpad
    int32 [B]; cu_seqlens int32 [B + 1]; q_dot_k_shift, lse float32; key_bias float32, a number for each row of K, by slot
    (KEY_BIAS); mean_scores float32 [B, H, ceil(Lq / 128), Lk] (SAGE). stats float32 [2, all_q_rows]: row maximum and base-2
    log-sum-exp of the scores of the quantized Q and K, +inf for rows without a (quantized) key, which makes their probabilities
    zero. lower, upper int32: of each query in the tokens of its sequence (BOUNDED); sinks float32 [num_heads] (HAS_SINKS);
    SOFTCAP 0: none. The rest as in scores.py.
    """
    KEPT: tl.constexpr = LEAD > 0
    batch_head, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    if CAUSAL:  # the longest first
        block = num_blocks - 1 - block
    batch, head = batch_head // num_heads, batch_head % num_heads
    head_k = head // (num_heads // num_heads_k)
    q_start, seqlen_q = sequence(cu_seqlens_q_ptr, batch, seqlen_q, VARLEN)
    k_start, seqlen_k = sequence(cu_seqlens_k_ptr, batch, seqlen_k, VARLEN)
    q_row = first_row(batch, head, num_heads, q_rows, q_start, 0, VARLEN) + block * BLOCK_M
    row_stats = stats_ptr
    if STORE_STATS:
        row_stats += q_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    if block * BLOCK_M >= seqlen_q:  # only padding; behind it, rows of the next sequence
        if STORE_STATS and block * BLOCK_M < tl.cdiv(seqlen_q, _PAD) * _PAD:
            tl.store(row_stats, float("inf"))
            tl.store(row_stats + all_q_rows, float("inf"))
        return
    leftpad = 0
    if HAS_KEY_MASK:
        leftpad = tl.load(leftpad_ptr + batch)
        key_mask_ptr += batch.to(tl.int64) * key_mask_stride
    seqlen_k -= leftpad
    slots = seqlen_k + LEAD
    k_row = first_row(batch, head_k, num_heads_k, k_rows, k_start, LEAD, VARLEN)
    if KEY_BIAS:
        key_bias_ptr += k_row
    rows, columns = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    inside = rows < seqlen_q
    q = q_desc.load([q_row, 0])

    out = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    out_hp = out
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)

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
            out, out_hp, row_sum, row_max = _attend(
                out, out_hp, row_sum, row_max, q, k_desc, v_desc, k_row, key_mask_ptr, key_bias_ptr,
                mean_scores_ptr, upper, lower, prefix_stop, LEAD + GROUP if KEPT else 0, head_stop, softmax_scale_log2,
                BLOCK_N, ORDER, True, HAS_KEY_MASK, QUANTIZE_PV, KEY_BIAS, SAGE, OUT_HP, MASKED, SOFTCAP,
            )  # fmt: skip
        if HAS_KEY_MASK:
            begin = first
        elif WINDOW > 0 or BOUNDED:
            out, out_hp, row_sum, row_max = _attend(
                out, out_hp, row_sum, row_max, q, k_desc, v_desc, k_row, key_mask_ptr, key_bias_ptr,
                mean_scores_ptr, upper, lower, prefix_stop, first, tl.minimum(begin, stop), softmax_scale_log2,
                BLOCK_N, ORDER, True, HAS_KEY_MASK, QUANTIZE_PV, KEY_BIAS, SAGE, OUT_HP, MASKED, SOFTCAP,
            )  # fmt: skip
    else:
        last, upper, begin, full, stop, open_start, open_blocks = slot_ranges(
            rows, block * BLOCK_M, seqlen_k - seqlen_q + LEAD, slots, LEAD, CAUSAL, BLOCK_M, BLOCK_N
        )  # fmt: skip
    if SAGE:
        mean_scores_ptr += mean_scores_row(batch_head, block * BLOCK_M, seqlen_q) * seqlen_k
    if HAS_KEY_MASK:
        full = begin
    else:
        out, out_hp, row_sum, row_max = _attend(
            out, out_hp, row_sum, row_max, q, k_desc, v_desc, k_row, key_mask_ptr, key_bias_ptr,
            mean_scores_ptr, upper, lower, prefix_stop, begin, full, softmax_scale_log2,
            BLOCK_N, ORDER, False, False, QUANTIZE_PV, KEY_BIAS, SAGE, OUT_HP, MASKED, SOFTCAP,
        )  # fmt: skip
    out, out_hp, row_sum, row_max = _attend(
        out, out_hp, row_sum, row_max, q, k_desc, v_desc, k_row, key_mask_ptr, key_bias_ptr,
        mean_scores_ptr, upper, lower, prefix_stop, full, stop, softmax_scale_log2,
        BLOCK_N, ORDER, True, HAS_KEY_MASK, QUANTIZE_PV, KEY_BIAS, SAGE, OUT_HP, MASKED, SOFTCAP,
    )  # fmt: skip

    if STORE_STATS:
        tl.store(row_stats, tl.where(inside & (row_max != float("-inf")), row_max, float("inf")))
    if QUANTIZE_PV:
        out = out * (1.0 / P_GLOBAL_SCALE)
    if KEPT:
        out, out_hp, row_sum, row_max = _attend_kept(
            out, out_hp, row_sum, row_max, q, k_desc, v_kept_desc, k_row, key_mask_ptr, key_bias_ptr, last, lower,
            prefix_stop, slots, open_start, first_block, open_blocks, softmax_scale_log2,
            BLOCK_N, ORDER, LEAD, HAS_KEY_MASK, KEY_BIAS, OUT_HP, MASKED, SOFTCAP,
        )  # fmt: skip
    if HAS_SINKS:  # a key without a value, for the sum alone
        blind, sink = row_sum == 0.0, tl.load(sinks_ptr + head)
        sink_log2 = sink * LOG2_E
        row_max_new = tl.maximum(row_max, tl.ceil(sink_log2))
        rescale = tl.exp2(row_max - row_max_new)
        row_sum = row_sum * rescale + tl.exp2(sink_log2 - row_max_new)
        out = out * rescale[:, None]
        if OUT_HP:
            out_hp = out_hp * rescale[:, None]
        row_max = row_max_new

    empty = row_sum == 0.0
    row_sum_safe = tl.where(empty, 1.0, row_sum)
    lse_log2 = row_max + tl.log2(row_sum)
    if STORE_STATS:
        tl.store(row_stats + all_q_rows, tl.where(inside & ~empty, lse_log2, float("inf")))
    lse = tl.where(empty, float("-inf"), lse_log2 * LN_2)
    if HAS_SINKS:
        lse = tl.where(blind, sink, lse)
    lse_offsets = batch.to(tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h + q_start + rows
    if HAS_K_SHIFT:
        lse += k_shift_scale * tl.load(q_dot_k_shift_ptr + lse_offsets, mask=inside, other=0.0)
    tl.store(lse_ptr + lse_offsets, lse, mask=inside)
    out_offsets = batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    out_offsets += (q_start + rows).to(tl.int64)[:, None] * out_stride_l + columns.to(tl.int64)[None, :] * out_stride_d
    where = inside[:, None] & (columns < HEAD_DIM_V)[None, :]
    tl.store(out_ptr + out_offsets, cast_rn(out / row_sum_safe[:, None], out_ptr.dtype.element_ty), mask=where)
    if OUT_HP:
        tl.store(out_hp_ptr + out_offsets, cast_rn(out_hp / row_sum_safe[:, None], out_hp_ptr.dtype.element_ty), mask=where)
