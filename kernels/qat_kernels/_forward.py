"""The forward of docs/NUMERICS.md, sections 3 and 4, as one Triton kernel. The reference is reference.py.

Q and K arrive quantized, V quantized and, where groups are kept, as it is. P~ is quantized on the fly, in groups of 16 keys that
lie inside a tile. Keys are counted from the first allowed one of the sequence, so that the groups are where they belong.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._nvfp4 import GROUP, P_GAIN, dot, load_tile, narrow, quantize_weights

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    out, twin, total, row_max,
    q, k_ptr, v_ptr, v_stride_l, v_stride_d, mask_ptr, lower, upper, keys, start, stop, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr, KEPT: tl.constexpr, MASKED: tl.constexpr, QUANTIZE: tl.constexpr, TWIN: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys from `start` to `stop`, in tiles of BLOCK_N.

    A row may see the keys below `upper` (without BOUNDED: all of these tiles) and, with KEPT, from `lower` on. With QUANTIZE
    `out` is 2688 times too large and takes PF~ V, while `twin` takes P~ V; otherwise both take the unquantized P~ V.
    """
    tile = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    valid = columns < HEAD_DIM
    k_offsets = tile[:, None] * HEAD_DIM + columns[None, :]
    v_offsets = tile[:, None] * v_stride_l + columns[None, :] * v_stride_d
    k_ptr += tl.cast(start, tl.int64) * HEAD_DIM
    v_ptr += tl.cast(start, tl.int64) * v_stride_l
    for first_key in range(start, stop, BLOCK_N):
        key = first_key + tile
        present = key < keys
        if MASKED:
            present = present & (tl.load(mask_ptr + key, mask=present, other=0) != 0)
        k = load_tile(k_ptr + k_offsets, present, valid, BOUNDED, BLOCK_D != HEAD_DIM)
        scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32)) * qk_scale
        if BOUNDED:
            allowed = key[None, :] < upper[:, None]
            if KEPT:
                allowed = allowed & (key[None, :] >= lower[:, None])
            if MASKED:
                allowed = allowed & present[None, :]
            scores = tl.where(allowed, scores, float("-inf"))
        # Maxima are rounded up, so that this rescaling is by a power of two and leaves the codes of P~ as they were.
        new_max = tl.maximum(row_max, tl.ceil(tl.max(scores, 1)))
        reference = new_max
        if BOUNDED:  # rows that have seen no key yet: everything is exp2(-inf) = 0
            reference = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - reference[:, None])
        rescale = tl.exp2(row_max - reference)
        row_max = new_max
        total = total * rescale + tl.sum(weights, 1)
        # Excluded values are zeros, never products with zero.
        v = load_tile(v_ptr + v_offsets, present, valid, BOUNDED, BLOCK_D != HEAD_DIM)
        out = out * rescale[:, None]
        if TWIN:
            twin = twin * rescale[:, None]
            twin = dot(narrow(weights, v.dtype), v, twin)
        if QUANTIZE:
            code, scale = quantize_weights(weights, 1)
            weights = tl.reshape(code * scale, (q.shape[0], BLOCK_N))  # at most six significant bits: exact in v.dtype
        out = dot(narrow(weights, v.dtype), v, out)
        k_ptr += BLOCK_N * HEAD_DIM
        v_ptr += BLOCK_N * v_stride_l
    return out, twin, total, row_max


@triton.jit
def attention_forward_kernel(
    qf_ptr, kf_ptr, vf_ptr, v_ptr, mask_ptr, first_ptr, shift_dot_ptr,
    out_ptr, twin_ptr, lse_ptr, stats_ptr,
    v_stride_b, v_stride_h, v_stride_l, v_stride_d,
    out_stride_b, out_stride_h, out_stride_l, out_stride_d,
    heads, key_heads, queries, all_keys, qk_scale, shift_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, QUANTIZE: tl.constexpr,
    TWIN: tl.constexpr, STATS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head.

    qf [B, H, Lq, D], kf and vf [B, Hk, Lk, D] contiguous; v, out and twin (strides of out) in any layout; mask uint8 [B, Lk];
    first int32 [B]; shift_dot, lse float32 [B, H, Lq]; stats float32 [B, H, 2, Lq]: row maximum and base-2 log-sum-exp of
    the scores of the quantized Q and K, +inf for rows without a (quantized) key, which makes their probabilities zero.
    """
    blocks = tl.cdiv(queries, BLOCK_M)
    row_of_heads, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if CAUSAL:  # the longest first
        block = blocks - 1 - block
    batch, head = row_of_heads // heads, row_of_heads % heads
    key_head = head // (heads // key_heads)
    batch, head, key_head, head_of_batch = batch.to(tl.int64), head.to(tl.int64), key_head.to(tl.int64), row_of_heads.to(tl.int64)

    first = 0
    if MASKED:
        first = tl.load(first_ptr + batch)
        mask_ptr += batch * all_keys + first
    keys = all_keys - first
    kv_offset = ((batch * key_heads + key_head) * all_keys + first) * HEAD_DIM
    kf_ptr += kv_offset
    v_ptr += batch * v_stride_b + key_head * v_stride_h + tl.cast(first, tl.int64) * v_stride_l

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    inside, valid = rows < queries, columns < HEAD_DIM
    q_offsets = (head_of_batch * queries + rows)[:, None] * HEAD_DIM + columns[None, :]
    q = load_tile(qf_ptr + q_offsets, inside, valid, True, BLOCK_D != HEAD_DIM)

    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    twin = out
    total = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)

    # A query's own place among the keys, the first and last of this block, and the keys that are quantized (or, with
    # BF16 PV, just allowed): [begin, stop), of which every row sees those before `full` and its own `upper`.
    own = rows + (all_keys - queries) - first
    own_first = block * BLOCK_M + (all_keys - queries) - first
    own_last = tl.minimum(own_first + BLOCK_M, keys) - 1
    lower = own & -GROUP
    if CAUSAL and QUANTIZE:
        begin = GROUP
        stop = tl.maximum(own_last & -GROUP, begin)
        full = tl.maximum((own_first & -GROUP) - begin, 0) // BLOCK_N * BLOCK_N + begin
        upper = lower
    elif CAUSAL:
        begin = 0
        stop = tl.maximum(own_last + 1, 0)
        full = tl.maximum(own_first + 1, 0) // BLOCK_N * BLOCK_N
        upper = own + 1
    else:
        begin = 0
        stop = keys
        full = keys // BLOCK_N * BLOCK_N
        upper = rows * 0 + keys
    if MASKED:
        full = begin

    if QUANTIZE:
        values_ptr, value_stride_l, value_stride_d = vf_ptr + kv_offset, HEAD_DIM, 1
    else:
        values_ptr, value_stride_l, value_stride_d = v_ptr, v_stride_l, v_stride_d
    if not MASKED:
        out, twin, total, row_max = _attend(
            out, twin, total, row_max,
            q, kf_ptr, values_ptr, value_stride_l, value_stride_d, mask_ptr, lower, upper, keys, begin, full, qk_scale,
            HEAD_DIM, BLOCK_D, BLOCK_N, False, False, False, QUANTIZE, TWIN,
        )  # fmt: skip
    out, twin, total, row_max = _attend(
        out, twin, total, row_max,
        q, kf_ptr, values_ptr, value_stride_l, value_stride_d, mask_ptr, lower, upper, keys, full, stop, qk_scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, True, False, MASKED, QUANTIZE, TWIN,
    )  # fmt: skip

    row_stats = stats_ptr
    if STATS:
        row_stats += head_of_batch * 2 * queries + rows
        tl.store(row_stats, tl.where(row_max == float("-inf"), float("inf"), row_max), mask=inside)
    if QUANTIZE:
        out = out * (1.0 / P_GAIN)
    if CAUSAL and QUANTIZE:
        # The kept groups, unquantized, on tiles of their own that are one group wide: the sink group, then the open ones.
        sink_stop = tl.minimum(tl.maximum(own_last + 1, 0), GROUP)
        out, twin, total, row_max = _attend(
            out, twin, total, row_max,
            q, kf_ptr, v_ptr, v_stride_l, v_stride_d, mask_ptr, lower, own + 1, keys, 0, sink_stop, qk_scale,
            HEAD_DIM, BLOCK_D, GROUP, True, False, MASKED, False, TWIN,
        )  # fmt: skip
        open_start = tl.maximum(own_first & -GROUP, GROUP)
        out, twin, total, row_max = _attend(
            out, twin, total, row_max,
            q, kf_ptr, v_ptr, v_stride_l, v_stride_d, mask_ptr, lower, own + 1, keys, open_start, own_last + 1, qk_scale,
            HEAD_DIM, BLOCK_D, GROUP, True, True, MASKED, False, TWIN,
        )  # fmt: skip

    empty = total == 0.0
    norm = tl.where(empty, 1.0, total)
    lse = row_max + tl.log2(total)
    if STATS:
        tl.store(row_stats + queries, tl.where(empty, float("inf"), lse), mask=inside)
    lse = tl.where(empty, float("-inf"), lse * LN_2)
    rows_of_all = head_of_batch * queries + rows
    if SHIFTED:
        lse += shift_scale * tl.load(shift_dot_ptr + rows_of_all, mask=inside, other=0.0)
    tl.store(lse_ptr + rows_of_all, lse, mask=inside)
    out_offsets = batch * out_stride_b + head * out_stride_h
    out_offsets += rows.to(tl.int64)[:, None] * out_stride_l + columns.to(tl.int64)[None, :] * out_stride_d
    where = inside[:, None] & valid[None, :]
    tl.store(out_ptr + out_offsets, narrow(out / norm[:, None], out_ptr.dtype.element_ty), mask=where)
    if TWIN:
        tl.store(twin_ptr + out_offsets, narrow(twin / norm[:, None], twin_ptr.dtype.element_ty), mask=where)
