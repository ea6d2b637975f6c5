"""The forward of docs/NUMERICS.md, sections 3 and 4, as one Triton kernel. The reference is reference.py.

Q, K and V arrive quantized, in the layout of _layout.py, and where groups are kept V as it is, too; P~ is quantized on the fly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._layout import PAD, first_row, ranges, sequence, slot_of, to_groups, to_tile
from ._nvfp4 import GROUP, P_GAIN, dot, narrow, round_weights, times_minus

LN_2 = tl.constexpr(0.6931471805599453)
_PAD = tl.constexpr(PAD)


@triton.jit
def soften(scores, row_max, total, qk_scale, BOUNDED: tl.constexpr, PAIRS: tl.constexpr = False):
    """One step of the online softmax; scores as `to_groups` returns them.

    Returns P~ of these scores, the largest P~ of each group, and the new state of the rows. Maxima are rounded up, so that
    rescaling is by a power of two and leaves the codes of P~ as they were.
    """
    largest = tl.max(tl.max(tl.max(scores, 5, keep_dims=True), 2, keep_dims=True), 4, keep_dims=True)
    tile_max = tl.max(tl.max(tl.max(tl.max(tl.max(largest, 5), 4), 3), 2), 1)
    new_max = tl.maximum(row_max, tl.ceil(tile_max * qk_scale))
    reference = new_max
    if BOUNDED:  # rows that have seen no key yet: everything is exp2(-inf) = 0
        reference = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(times_minus(scores, qk_scale, reference[:, None, None, None, None, None], PAIRS))
    largest = tl.exp2(largest * qk_scale - reference[:, None, None, None, None, None])
    total = total * tl.exp2(row_max - reference) + tl.sum(tl.sum(tl.sum(tl.sum(tl.sum(weights, 5), 2), 3), 2), 1)
    return weights, largest, reference, new_max, total


@triton.jit
def _attend(
    out, twin, total, row_max,
    q, k_desc, v_desc, k_row, mask_ptr, upper, start, stop, qk_scale,
    BLOCK_N: tl.constexpr, ORDER: tl.constexpr, BOUNDED: tl.constexpr, MASKED: tl.constexpr, QUANTIZE: tl.constexpr,
    TWIN: tl.constexpr,
):  # fmt: skip
    """The online softmax over the slots from `start` to `stop`, in tiles of BLOCK_N.

    With BOUNDED a row may see those below `upper`, otherwise all of them. With QUANTIZE `out` is 2688 times too large
    and takes PF~ VF, while `twin` takes P~ VF; otherwise `out` takes the unquantized P~.
    """
    for first_slot in range(start, stop, BLOCK_N):
        k = k_desc.load([k_row + first_slot, 0])
        scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32))
        if BOUNDED:
            slot = first_slot + slot_of(tl.arange(0, BLOCK_N), ORDER)
            allowed = slot[None, :] < upper[:, None]
            if MASKED:
                allowed = allowed & (tl.load(mask_ptr + slot) != 0)[None, :]
            scores = tl.where(allowed, scores, float("-inf"))
        groups, largest, reference, new_max, total = soften(to_groups(scores, ORDER), row_max, total, qk_scale, BOUNDED)
        # Integer maxima seldom change: most tiles need no rescaling at all.
        if tl.max((new_max > row_max).to(tl.int32), 0) != 0:
            rescale = tl.exp2(row_max - reference)
            out = out * rescale[:, None]
            if TWIN:
                twin = twin * rescale[:, None]
        row_max = new_max
        v = v_desc.load([k_row + first_slot, 0])
        if TWIN:
            twin = dot(to_tile(narrow(groups, v.dtype)), v, twin)
        if QUANTIZE:
            groups = round_weights(groups, largest)
        out = dot(to_tile(narrow(groups, v.dtype)), v, out)
    return out, twin, total, row_max


@triton.jit
def _attend_kept(
    out, twin, total, row_max,
    q, k_desc, v_desc, k_row, mask_ptr, own, slots, start, blocks, qk_scale,
    BLOCK_N: tl.constexpr, ORDER: tl.constexpr, LEAD: tl.constexpr, MASKED: tl.constexpr, TWIN: tl.constexpr,
):  # fmt: skip
    """The kept groups, with unquantized P~ and V: the sink group, then the open groups in `blocks` tiles from `start` on."""
    for block in range(blocks + 1):
        first_slot = tl.where(block == 0, LEAD + GROUP - BLOCK_N, start + (block - 1) * BLOCK_N)
        lower = tl.where(block == 0, LEAD, tl.maximum(own & -GROUP, LEAD + GROUP))
        slot = first_slot + slot_of(tl.arange(0, BLOCK_N), ORDER)
        k = k_desc.load([k_row + first_slot, 0])
        scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32))
        present = slot < slots
        if MASKED:
            present = present & (tl.load(mask_ptr + slot) != 0)
        allowed = (slot[None, :] >= lower[:, None]) & (slot[None, :] <= own[:, None]) & present[None, :]
        scores = tl.where(allowed, scores, float("-inf"))
        groups, _, reference, new_max, total = soften(to_groups(scores, ORDER), row_max, total, qk_scale, True)
        rescale = tl.exp2(row_max - reference)
        row_max = new_max
        v = v_desc.load([k_row + first_slot, 0])
        weights = to_tile(narrow(groups, v.dtype))
        out = dot(weights, v, out * rescale[:, None])
        if TWIN:
            twin = dot(weights, v, twin * rescale[:, None])
    return out, twin, total, row_max


@triton.jit
def attention_forward_kernel(
    q_desc, k_desc, v_desc, kept_desc, mask_ptr, first_ptr, shift_dot_ptr, cu_q_ptr, cu_k_ptr,
    out_ptr, twin_ptr, lse_ptr, stats_ptr,
    out_stride_b, out_stride_h, out_stride_l, out_stride_d,
    lse_stride_b, lse_stride_h, mask_stride,
    heads, key_heads, queries, keys, blocks, q_rows, k_rows, all_q_rows, qk_scale, shift_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ORDER: tl.constexpr,
    LEAD: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, VARLEN: tl.constexpr, QUANTIZE: tl.constexpr,
    TWIN: tl.constexpr, STATS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head of one sequence.

    q, k, v, kept: operands (_layout.py); v is quantized with QUANTIZE, kept, for the kept groups, never. out, twin: any strides,
    for packed sequences with batch stride 0. mask uint8, a row of k_rows for each sequence, by slot; first int32 [B]; cu int32
    [B + 1]; shift_dot, lse float32. stats float32 [2, all_q_rows]: row maximum and base-2 log-sum-exp of the scores of the
    quantized Q and K, +inf for rows without a (quantized) key, which makes their probabilities zero.
    """
    KEPT: tl.constexpr = LEAD > 0
    row_of_heads, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if CAUSAL:  # the longest first
        block = blocks - 1 - block
    index, head = row_of_heads // heads, row_of_heads % heads
    key_head = head // (heads // key_heads)
    q_start, queries = sequence(cu_q_ptr, index, queries, VARLEN)
    k_start, keys = sequence(cu_k_ptr, index, keys, VARLEN)
    q_row = first_row(index, head, heads, q_rows, q_start, 0, VARLEN) + block * BLOCK_M
    row_stats = stats_ptr
    if STATS:
        row_stats += q_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    if block * BLOCK_M >= queries:  # only padding; behind it, rows of the next sequence
        if STATS and block * BLOCK_M < tl.cdiv(queries, _PAD) * _PAD:
            tl.store(row_stats, float("inf"))
            tl.store(row_stats + all_q_rows, float("inf"))
        return
    first = 0
    if MASKED:
        first = tl.load(first_ptr + index)
        mask_ptr += index.to(tl.int64) * mask_stride
    keys -= first
    slots = keys + LEAD
    k_row = first_row(index, key_head, key_heads, k_rows, k_start, LEAD, VARLEN)
    rows, columns = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = rows < queries
    q = q_desc.load([q_row, 0])

    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    twin = out
    total = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)

    own, upper, begin, full, stop, open_start, open_blocks = ranges(
        rows, block * BLOCK_M, keys - queries + LEAD, slots, LEAD, CAUSAL, BLOCK_M, BLOCK_N
    )  # fmt: skip
    if MASKED:
        full = begin
    else:
        out, twin, total, row_max = _attend(
            out, twin, total, row_max, q, k_desc, v_desc, k_row, mask_ptr, upper, begin, full, qk_scale,
            BLOCK_N, ORDER, False, False, QUANTIZE, TWIN,
        )  # fmt: skip
    out, twin, total, row_max = _attend(
        out, twin, total, row_max, q, k_desc, v_desc, k_row, mask_ptr, upper, full, stop, qk_scale,
        BLOCK_N, ORDER, True, MASKED, QUANTIZE, TWIN,
    )  # fmt: skip

    if STATS:
        tl.store(row_stats, tl.where(inside & (row_max != float("-inf")), row_max, float("inf")))
    if QUANTIZE:
        out = out * (1.0 / P_GAIN)
    if KEPT:
        out, twin, total, row_max = _attend_kept(
            out, twin, total, row_max, q, k_desc, kept_desc, k_row, mask_ptr, own, slots,
            open_start, open_blocks, qk_scale,
            BLOCK_N, ORDER, LEAD, MASKED, TWIN,
        )  # fmt: skip

    empty = total == 0.0
    norm = tl.where(empty, 1.0, total)
    lse = row_max + tl.log2(total)
    if STATS:
        tl.store(row_stats + all_q_rows, tl.where(inside & ~empty, lse, float("inf")))
    lse = tl.where(empty, float("-inf"), lse * LN_2)
    lse_offsets = index.to(tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h + q_start + rows
    if SHIFTED:
        lse += shift_scale * tl.load(shift_dot_ptr + lse_offsets, mask=inside, other=0.0)
    tl.store(lse_ptr + lse_offsets, lse, mask=inside)
    out_offsets = index.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    out_offsets += (q_start + rows).to(tl.int64)[:, None] * out_stride_l + columns.to(tl.int64)[None, :] * out_stride_d
    where = inside[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(out_ptr + out_offsets, narrow(out / norm[:, None], out_ptr.dtype.element_ty), mask=where)
    if TWIN:
        tl.store(twin_ptr + out_offsets, narrow(twin / norm[:, None], twin_ptr.dtype.element_ty), mask=where)
