"""The backward of docs/NUMERICS.md, section 5, as three Triton kernels: row sums, dQ and dK/dV. The reference is reference.py.

Every gradient is summed by one program in a fixed order: the same bits in every run. P and P~ are recomputed from the quantized
Q and K and the row statistics of the forward (_forward.py), so P~ is quantized on the grid that the forward used. dQ needs P
alone; only dV sees the quantized one.

Operands are in the layout of _layout.py, but slots in their own order: here a group lies in the rows of a matrix unit's
accumulator, or is not needed. With norm = 1 / l of the row,
    dV = PF~^T (norm dO)    and    dS = P~ (norm dO V^T - norm D),
so dK/dV reads norm dO in place of dO (an operand too, bfloat16) and multiplies no probability by the norm. D of that kernel is
the row sum of O' and the rounded norm dO, so that the rows of dS sum to zero as exactly as with dO itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._layout import PAD, first_row, ranges, sequence
from ._nvfp4 import GROUP, P_GAIN, dot, hadamard, narrow, round_weights

_PAD = tl.constexpr(PAD)


@triton.jit
def prepare_kernel(
    grad_ptr, twin_ptr, stats_ptr, cu_q_ptr, normed_ptr, plain_ptr, delta_ptr,
    grad_stride_b, grad_stride_h, grad_stride_l, grad_stride_d,
    twin_stride_b, twin_stride_h, twin_stride_l, twin_stride_d,
    heads, queries, blocks, q_rows, all_q_rows,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, VARLEN: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """norm dO as an operand, and with PLAIN dO too; delta float32 [2, all_q_rows]: D, from dO and from norm dO.

    grad, twin: dO and O' in any layout; stats as `_forward.attention_forward_kernel` leaves them.
    """
    row_of_heads, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    index, head = row_of_heads // heads, row_of_heads % heads
    start, queries = sequence(cu_q_ptr, index, queries, VARLEN)
    if block * BLOCK_M >= tl.cdiv(queries, _PAD) * _PAD:
        return
    rows, columns = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    where = (rows < queries)[:, None] & (columns < HEAD_DIM)[None, :]
    token, column = (start + rows).to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    index, head = index.to(tl.int64), head.to(tl.int64)
    grad_ptr += index * grad_stride_b + head * grad_stride_h
    twin_ptr += index * twin_stride_b + head * twin_stride_h
    grad = tl.load(grad_ptr + token * grad_stride_l + column * grad_stride_d, mask=where, other=0.0).to(tl.float32)
    twin = tl.load(twin_ptr + token * twin_stride_l + column * twin_stride_d, mask=where, other=0.0).to(tl.float32)
    row = first_row(index, head, heads, q_rows, start, 0, VARLEN) + rows
    row_max, log_sum = tl.load(stats_ptr + row), tl.load(stats_ptr + all_q_rows + row)
    norm = tl.where(row_max == float("inf"), 0.0, tl.exp2(row_max - log_sum))  # 1 / l
    normed = narrow(grad * norm[:, None], normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + row[:, None] * BLOCK_D + columns[None, :], normed)
    if PLAIN:
        tl.store(plain_ptr + row[:, None] * BLOCK_D + columns[None, :], narrow(grad, plain_ptr.dtype.element_ty))
    tl.store(delta_ptr + row, tl.sum(grad * twin, 1))
    tl.store(delta_ptr + all_q_rows + row, tl.sum(normed.to(tl.float32) * twin, 1))


@triton.jit
def _sum_grad_query(
    grad_query, q, grad, delta, log_sum, k_desc, v_desc, k_row, mask_ptr, upper, start, stop, qk_scale,
    BLOCK_N: tl.constexpr, BOUNDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dS KF over the slots from `start` to `stop`; bounds as in `_forward._attend`."""
    zeros = tl.zeros((q.shape[0], BLOCK_N), tl.float32)
    for first_slot in range(start, stop, BLOCK_N):
        k = k_desc.load([k_row + first_slot, 0])
        v = v_desc.load([k_row + first_slot, 0])
        weights = tl.exp2(dot(q, tl.trans(k), zeros) * qk_scale - log_sum[:, None])
        if BOUNDED:
            slot = first_slot + tl.arange(0, BLOCK_N)
            allowed = slot[None, :] < upper[:, None]
            if MASKED:
                allowed = allowed & (tl.load(mask_ptr + slot) != 0)[None, :]
            weights = tl.where(allowed, weights, 0.0)
        grad_scores = weights * (dot(grad, tl.trans(v), zeros) - delta[:, None])
        grad_query = dot(narrow(grad_scores, k.dtype), k, grad_query)
    return grad_query


@triton.jit
def _sum_grad_query_kept(
    grad_query, q, grad, delta, log_sum, k_desc, v_desc, k_row, mask_ptr, own, slots, start, blocks, qk_scale,
    BLOCK_N: tl.constexpr, LEAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The kept groups, where dP = dO V^T: the same steps as in `_forward._attend_kept`."""
    zeros = tl.zeros((q.shape[0], BLOCK_N), tl.float32)
    for block in range(blocks + 1):
        first_slot = tl.where(block == 0, LEAD + GROUP - BLOCK_N, start + (block - 1) * BLOCK_N)
        lower = tl.where(block == 0, LEAD, tl.maximum(own & -GROUP, LEAD + GROUP))
        slot = first_slot + tl.arange(0, BLOCK_N)
        k, v = k_desc.load([k_row + first_slot, 0]), v_desc.load([k_row + first_slot, 0])
        present = slot < slots
        if MASKED:
            present = present & (tl.load(mask_ptr + slot) != 0)
        allowed = (slot[None, :] >= lower[:, None]) & (slot[None, :] <= own[:, None]) & present[None, :]
        weights = tl.exp2(dot(q, tl.trans(k), zeros) * qk_scale - log_sum[:, None])
        weights = tl.where(allowed, weights, 0.0)
        grad_scores = weights * (dot(grad, tl.trans(v), zeros) - delta[:, None])
        grad_query = dot(narrow(grad_scores, k.dtype), k, grad_query)
    return grad_query


@triton.jit
def grad_query_kernel(
    q_desc, k_desc, v_desc, kept_desc, mask_ptr, first_ptr, cu_q_ptr, cu_k_ptr,
    grad_ptr, delta_ptr, stats_ptr, grad_query_ptr,
    grad_stride_b, grad_stride_h, grad_stride_l, grad_stride_d,
    out_stride_b, out_stride_h, out_stride_l, mask_stride,
    heads, key_heads, queries, keys, blocks, q_rows, k_rows, all_q_rows, qk_scale, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEAD: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, VARLEN: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries of one head. Layouts as in `_forward.attention_forward_kernel`; grad is dO in any layout."""
    KEPT: tl.constexpr = LEAD > 0
    row_of_heads, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if CAUSAL:  # the longest first
        block = blocks - 1 - block
    index, head = row_of_heads // heads, row_of_heads % heads
    key_head = head // (heads // key_heads)
    q_start, queries = sequence(cu_q_ptr, index, queries, VARLEN)
    k_start, keys = sequence(cu_k_ptr, index, keys, VARLEN)
    if block * BLOCK_M >= queries:
        return
    first = 0
    if MASKED:
        first = tl.load(first_ptr + index)
        mask_ptr += index.to(tl.int64) * mask_stride
    keys -= first
    slots = keys + LEAD
    q_row = first_row(index, head, heads, q_rows, q_start, 0, VARLEN) + block * BLOCK_M
    k_row = first_row(index, key_head, key_heads, k_rows, k_start, LEAD, VARLEN)
    rows, columns = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    where = (rows < queries)[:, None] & (columns < HEAD_DIM)[None, :]
    q = q_desc.load([q_row, 0])
    tokens = (q_start + rows).to(tl.int64)[:, None]
    grad_ptr += index.to(tl.int64) * grad_stride_b + head.to(tl.int64) * grad_stride_h
    grad = tl.load(grad_ptr + tokens * grad_stride_l + columns.to(tl.int64)[None, :] * grad_stride_d, mask=where, other=0.0)
    grad = narrow(grad, q.dtype)
    row_stats = q_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    delta, log_sum = tl.load(delta_ptr + row_stats), tl.load(stats_ptr + all_q_rows + row_stats)

    own, upper, begin, full, stop, open_start, open_blocks = ranges(
        rows, block * BLOCK_M, keys - queries + LEAD, slots, LEAD, CAUSAL, BLOCK_M, BLOCK_N
    )  # fmt: skip
    grad_query = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if MASKED:
        full = begin
    else:
        grad_query = _sum_grad_query(
            grad_query, q, grad, delta, log_sum, k_desc, v_desc, k_row, mask_ptr, upper, begin, full, qk_scale,
            BLOCK_N, False, False,
        )  # fmt: skip
    grad_query = _sum_grad_query(
        grad_query, q, grad, delta, log_sum, k_desc, v_desc, k_row, mask_ptr, upper, full, stop, qk_scale,
        BLOCK_N, True, MASKED,
    )  # fmt: skip
    if KEPT:
        grad_query = _sum_grad_query_kept(
            grad_query, q, grad, delta, log_sum, k_desc, kept_desc, k_row, mask_ptr, own, slots,
            open_start, open_blocks, qk_scale, BLOCK_N, LEAD, MASKED,
        )  # fmt: skip

    grad_query *= scale
    if ROTATE:
        grad_query = hadamard(grad_query, BLOCK_M, BLOCK_D)
    grad_query_ptr += index.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    grad_query = narrow(grad_query, grad_query_ptr.dtype.element_ty)
    tl.store(grad_query_ptr + tokens * out_stride_l + columns[None, :], grad_query, mask=where)


@triton.jit
def _sum_grad_key_value(
    grad_key, grad_value, k, v, slot, present, q_desc, grad_desc, stats_ptr, delta_ptr,
    q_row, q_rows, query_heads, own_offset, start, stop, qk_scale,
    BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, BOUNDED: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    """dS^T QF and PF~^T (norm dO) over the queries from `start` to `stop`, of all heads that share the keys.

    Scores are [keys, queries]. With BOUNDED and CAUSAL a key is seen by the queries behind its group (QUANTIZE), or by all from
    itself on.
    """
    zeros = tl.zeros((k.shape[0], BLOCK_M), tl.float32)
    tile = tl.arange(0, BLOCK_M)
    blocks = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_M)
    # One loop over heads and blocks: nested, they would start the pipeline anew for each head.
    for step in range(query_heads * blocks):
        first_query = start + step % blocks * BLOCK_M
        row = q_row + step // blocks * q_rows + first_query
        q, grad = q_desc.load([row, 0]), grad_desc.load([row, 0])
        row_max, delta = tl.load(stats_ptr + row + tile), tl.load(delta_ptr + row + tile)
        weights = tl.exp2(dot(k, tl.trans(q), zeros) * qk_scale - row_max[None, :])
        if BOUNDED:
            allowed = present[:, None]
            if CAUSAL:
                own = (first_query + tile + own_offset)[None, :]
                allowed = allowed & (slot[:, None] < ((own & -GROUP) if QUANTIZE else own + 1))
            weights = tl.where(allowed, weights, 0.0)
        contributing = weights
        if QUANTIZE:
            groups = tl.reshape(weights, (k.shape[0] // GROUP, GROUP, BLOCK_M))
            groups = round_weights(groups, tl.max(groups, 1, keep_dims=True))
            contributing = tl.reshape(groups, (k.shape[0], BLOCK_M))
        grad_value = dot(narrow(contributing, q.dtype), grad, grad_value)
        grad_scores = weights * (dot(v, tl.trans(grad), zeros) - delta[None, :])
        grad_key = dot(narrow(grad_scores, q.dtype), q, grad_key)
    return grad_key, grad_value


@triton.jit
def _sum_grad_key_value_kept(
    grad_key, grad_value, k, v, slot, present, q_desc, grad_desc, stats_ptr, delta_ptr,
    q_row, q_rows, query_heads, own_offset, group, start, stop, qk_scale, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The same for kept groups: dS^T QF and P^T dO over the queries of a key's own group, or with `group` 0 over all behind it.

    With the norm inside P: a kept key may outweigh the others by more than float32 can hold beside their maximum.
    """
    zeros = tl.zeros((k.shape[0], BLOCK_M), tl.float32)
    tile = tl.arange(0, BLOCK_M)
    blocks = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_M)
    for step in range(query_heads * blocks):
        first_query = start + step % blocks * BLOCK_M
        row = q_row + step // blocks * q_rows + first_query
        q, grad = q_desc.load([row, 0]), grad_desc.load([row, 0])
        log_sum, delta = tl.load(stats_ptr + row + tile), tl.load(delta_ptr + row + tile)
        own = (first_query + tile + own_offset)[None, :]
        allowed = present[:, None] & (slot[:, None] <= own) & (slot[:, None] >= (own & group))
        weights = tl.exp2(dot(k, tl.trans(q), zeros) * qk_scale - log_sum[None, :])
        weights = tl.where(allowed, weights, 0.0)
        grad_value = dot(narrow(weights, q.dtype), grad, grad_value)
        grad_scores = weights * (dot(v, tl.trans(grad), zeros) - delta[None, :])
        grad_key = dot(narrow(grad_scores, q.dtype), q, grad_key)
    return grad_key, grad_value


@triton.jit
def grad_key_value_kernel(
    q_desc, k_desc, v_desc, normed_desc, kept_desc, grad_desc, mask_ptr, first_ptr, cu_q_ptr, cu_k_ptr,
    delta_ptr, stats_ptr, grad_key_ptr, grad_value_ptr,
    out_stride_b, out_stride_h, out_stride_l, mask_stride,
    heads, key_heads, queries, keys, blocks, q_rows, k_rows, all_q_rows, qk_scale, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEAD: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, VARLEN: tl.constexpr, QUANTIZE: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N slots of one key head, summed over the query heads that share them.

    Layouts as in `grad_query_kernel`; normed: norm dO. Where groups are kept, block 0 has the sink group, for all of whose
    queries P and V (kept) are not quantized. Excluded keys are not written.
    """
    KEPT: tl.constexpr = LEAD > 0
    row_of_heads, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    index, key_head = row_of_heads // key_heads, row_of_heads % key_heads
    q_start, queries = sequence(cu_q_ptr, index, queries, VARLEN)
    k_start, keys = sequence(cu_k_ptr, index, keys, VARLEN)
    first = 0
    if MASKED:
        first = tl.load(first_ptr + index)
        mask_ptr += index.to(tl.int64) * mask_stride
    keys -= first
    slots = keys + LEAD
    own_offset = slots - queries
    first_slot = block * BLOCK_N
    if KEPT:
        first_slot += LEAD + GROUP - BLOCK_N
    if first_slot >= slots:
        return
    query_heads = heads // key_heads
    q_row = first_row(index, key_head * query_heads, heads, q_rows, q_start, 0, VARLEN)
    k_row = first_row(index, key_head, key_heads, k_rows, k_start, LEAD, VARLEN)
    slot, columns = first_slot + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    present = (slot >= LEAD) & (slot < slots)
    if MASKED:
        present = present & (tl.load(mask_ptr + slot, mask=present, other=0) != 0)
    k, v = k_desc.load([k_row + first_slot, 0]), v_desc.load([k_row + first_slot, 0])
    index, key_head = index.to(tl.int64), key_head.to(tl.int64)

    grad_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_value = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    kept_from = 0
    kept_until = 0
    if KEPT:
        kept_from = tl.maximum(first_slot - own_offset, 0) // BLOCK_M * BLOCK_M
        kept_until = tl.minimum(tl.maximum(first_slot + BLOCK_N - own_offset, 0), queries)
    if KEPT and block == 0:
        kept_until = queries
    else:
        # Queries in [begin, full) see some of the slots, those from `full` on see all of them.
        begin = 0
        full = 0
        if KEPT:
            begin = tl.maximum(first_slot + GROUP - own_offset, 0) // BLOCK_M * BLOCK_M
            full = first_slot + BLOCK_N - own_offset
        elif CAUSAL:
            begin = tl.maximum(first_slot - own_offset, 0) // BLOCK_M * BLOCK_M
            full = first_slot + BLOCK_N - 1 - own_offset
        # A last, shorter tile is bounded for everyone.
        full = queries if MASKED else tl.where(slots < first_slot + BLOCK_N, queries, full)
        full = begin + tl.cdiv(tl.maximum(full - begin, 0), BLOCK_M) * BLOCK_M
        grad_key, grad_value = _sum_grad_key_value(
            grad_key, grad_value, k, v, slot, present, q_desc, normed_desc, stats_ptr, delta_ptr + all_q_rows,
            q_row, q_rows, query_heads, own_offset, begin, tl.minimum(full, queries), qk_scale, BLOCK_M, CAUSAL, True, QUANTIZE,
        )  # fmt: skip
        if not MASKED:
            grad_key, grad_value = _sum_grad_key_value(
                grad_key, grad_value, k, v, slot, present, q_desc, normed_desc, stats_ptr, delta_ptr + all_q_rows,
                q_row, q_rows, query_heads, own_offset, full, queries, qk_scale, BLOCK_M, CAUSAL, False, QUANTIZE,
            )  # fmt: skip
    if QUANTIZE:
        grad_value *= 1.0 / P_GAIN
    if KEPT:
        v = kept_desc.load([k_row + first_slot, 0])
        grad_key, grad_value = _sum_grad_key_value_kept(
            grad_key, grad_value, k, v, slot, present, q_desc, grad_desc, stats_ptr + all_q_rows, delta_ptr,
            q_row, q_rows, query_heads, own_offset, tl.where(block == 0, 0, -GROUP), kept_from, kept_until, qk_scale, BLOCK_M,
        )  # fmt: skip

    grad_key *= scale
    if ROTATE:
        grad_key = hadamard(grad_key, BLOCK_N, BLOCK_D)
    where = present[:, None] & (columns < HEAD_DIM)[None, :]
    offsets = index * out_stride_b + key_head * out_stride_h
    offsets += (k_start + first + slot - LEAD).to(tl.int64)[:, None] * out_stride_l + columns[None, :]
    tl.store(grad_key_ptr + offsets, narrow(grad_key, grad_key_ptr.dtype.element_ty), mask=where)
    tl.store(grad_value_ptr + offsets, narrow(grad_value, grad_value_ptr.dtype.element_ty), mask=where)
