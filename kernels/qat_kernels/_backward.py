"""The backward of docs/NUMERICS.md, section 5, as three Triton kernels: D, dQ and dK/dV. The reference is reference.py.

Every gradient is summed by one program in a fixed order: the same bits in every run. P and P~ are recomputed from the quantized
Q and K and the row statistics of the forward (_forward.py), so P~ is quantized on the grid that the forward used. dQ needs P
alone; only dV sees the quantized one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._nvfp4 import GROUP, P_GAIN, dot, hadamard, load_tile, narrow, quantize_weights


@triton.jit
def delta_kernel(
    grad_ptr, twin_ptr, delta_ptr,
    grad_stride_b, grad_stride_h, grad_stride_l, grad_stride_d,
    twin_stride_b, twin_stride_h, twin_stride_l, twin_stride_d,
    heads, queries,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """D_i = sum_d dO_id O'_id: grad and twin [B, H, Lq, D] -> delta float32 [B, H, Lq]."""
    blocks = tl.cdiv(queries, BLOCK_M)
    row_of_heads, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    batch, head = row_of_heads // heads, row_of_heads % heads
    rows, columns = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    where = (rows < queries)[:, None] & (columns < HEAD_DIM)[None, :]
    row, column = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    grad_ptr += batch * grad_stride_b + head * grad_stride_h
    twin_ptr += batch * twin_stride_b + head * twin_stride_h
    grad = tl.load(grad_ptr + row * grad_stride_l + column * grad_stride_d, mask=where, other=0.0).to(tl.float32)
    twin = tl.load(twin_ptr + row * twin_stride_l + column * twin_stride_d, mask=where, other=0.0).to(tl.float32)
    tl.store(delta_ptr + row_of_heads * queries + rows, tl.sum(grad * twin, 1), mask=rows < queries)


@triton.jit
def _sum_grad_query(
    grad_query,
    q, grad, delta, log_sum, k_ptr, v_ptr, v_stride_l, v_stride_d, mask_ptr, lower, upper, keys, start, stop, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr, KEPT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dS KF over the keys from `start` to `stop`; bounds as in `_forward._attend`."""
    tile = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    valid = columns < HEAD_DIM
    k_offsets = tile[:, None] * HEAD_DIM + columns[None, :]
    v_offsets = tile[:, None] * v_stride_l + columns[None, :] * v_stride_d
    zeros = tl.zeros((q.shape[0], BLOCK_N), tl.float32)
    k_ptr += tl.cast(start, tl.int64) * HEAD_DIM
    v_ptr += tl.cast(start, tl.int64) * v_stride_l
    for first_key in range(start, stop, BLOCK_N):
        key = first_key + tile
        present = key < keys
        if MASKED:
            present = present & (tl.load(mask_ptr + key, mask=present, other=0) != 0)
        k = load_tile(k_ptr + k_offsets, present, valid, BOUNDED, BLOCK_D != HEAD_DIM)
        v = load_tile(v_ptr + v_offsets, present, valid, BOUNDED, BLOCK_D != HEAD_DIM)
        scores = dot(q, tl.trans(k), zeros) * qk_scale
        if BOUNDED:
            allowed = key[None, :] < upper[:, None]
            if KEPT:
                allowed = allowed & (key[None, :] >= lower[:, None])
            if MASKED:
                allowed = allowed & present[None, :]
            scores = tl.where(allowed, scores, float("-inf"))
        weights = tl.exp2(scores - log_sum[:, None])
        grad_scores = weights * (dot(grad, tl.trans(v), zeros) - delta[:, None])
        grad_query = dot(narrow(grad_scores, k.dtype), k, grad_query)
        k_ptr += BLOCK_N * HEAD_DIM
        v_ptr += BLOCK_N * v_stride_l
    return grad_query


@triton.jit
def grad_query_kernel(
    qf_ptr, kf_ptr, vf_ptr, v_ptr, mask_ptr, first_ptr, grad_ptr, delta_ptr, stats_ptr, grad_query_ptr,
    v_stride_b, v_stride_h, v_stride_l, v_stride_d,
    grad_stride_b, grad_stride_h, grad_stride_l, grad_stride_d,
    heads, key_heads, queries, all_keys, qk_scale, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, QUANTIZE: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries of one head. Layouts as in `_forward.attention_forward_kernel`; grad is dO in any layout."""
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
    rows_of_all = head_of_batch * queries + rows
    q_offsets = rows_of_all[:, None] * HEAD_DIM + columns[None, :]
    q = load_tile(qf_ptr + q_offsets, inside, valid, True, BLOCK_D != HEAD_DIM)
    grad_ptr += batch * grad_stride_b + head * grad_stride_h
    grad_offsets = rows.to(tl.int64)[:, None] * grad_stride_l + columns.to(tl.int64)[None, :] * grad_stride_d
    grad = load_tile(grad_ptr + grad_offsets, inside, valid, True, BLOCK_D != HEAD_DIM)
    delta = tl.load(delta_ptr + rows_of_all, mask=inside, other=0.0)
    log_sum = tl.load(stats_ptr + (head_of_batch * 2 + 1) * queries + rows, mask=inside, other=float("inf"))

    # The same ranges of keys as in the forward.
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
    grad_query = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if not MASKED:
        grad_query = _sum_grad_query(
            grad_query,
            q, grad, delta, log_sum, kf_ptr, values_ptr, value_stride_l, value_stride_d, mask_ptr, lower, upper, keys,
            begin, full, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_N, False, False, False,
        )  # fmt: skip
    grad_query = _sum_grad_query(
        grad_query,
        q, grad, delta, log_sum, kf_ptr, values_ptr, value_stride_l, value_stride_d, mask_ptr, lower, upper, keys,
        full, stop, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_N, True, False, MASKED,
    )  # fmt: skip
    if CAUSAL and QUANTIZE:  # the kept groups: dP = dO V^T
        sink_stop = tl.minimum(tl.maximum(own_last + 1, 0), GROUP)
        grad_query = _sum_grad_query(
            grad_query,
            q, grad, delta, log_sum, kf_ptr, v_ptr, v_stride_l, v_stride_d, mask_ptr, lower, own + 1, keys,
            0, sink_stop, qk_scale, HEAD_DIM, BLOCK_D, GROUP, True, False, MASKED,
        )  # fmt: skip
        open_start = tl.maximum(own_first & -GROUP, GROUP)
        grad_query = _sum_grad_query(
            grad_query,
            q, grad, delta, log_sum, kf_ptr, v_ptr, v_stride_l, v_stride_d, mask_ptr, lower, own + 1, keys,
            open_start, own_last + 1, qk_scale, HEAD_DIM, BLOCK_D, GROUP, True, True, MASKED,
        )  # fmt: skip

    grad_query *= scale
    if ROTATE:
        grad_query = hadamard(grad_query, BLOCK_M, BLOCK_D)
    tl.store(
        grad_query_ptr + q_offsets, narrow(grad_query, grad_query_ptr.dtype.element_ty), mask=inside[:, None] & valid[None, :]
    )


@triton.jit
def _sum_grad_key_value(
    grad_key, grad_value,
    k, v, key, present, qf_ptr, grad_ptr, grad_stride_h, grad_stride_l, grad_stride_d, delta_ptr, stats_ptr,
    first_head, query_heads, queries, own_offset, start, stop, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr, BOUNDED: tl.constexpr, OPEN: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    """dS^T QF and PF^T dO (without QUANTIZE: P^T dO) over the queries from `start` to `stop` of all heads that share the keys.

    Scores are transposed, [keys, queries]. With BOUNDED and CAUSAL a key is seen by the queries behind its group
    (QUANTIZE), by those of its group from itself on (OPEN), or by all from itself on.
    """
    tile = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    valid = columns < HEAD_DIM
    q_offsets = tile[:, None] * HEAD_DIM + columns[None, :]
    grad_offsets = tile[:, None] * grad_stride_l + columns[None, :] * grad_stride_d
    zeros = tl.zeros((k.shape[0], BLOCK_M), tl.float32)
    blocks = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_M)
    # One loop over heads and blocks: nested, they would need more registers and start the pipeline anew for each head.
    for step in range(query_heads * blocks):
        head = tl.cast(first_head + step // blocks, tl.int64)
        first_row = start + step % blocks * BLOCK_M
        rows = first_row + tile
        inside = rows < queries
        q_ptr = qf_ptr + (head * queries + first_row) * HEAD_DIM
        grad_row_ptr = grad_ptr + head * grad_stride_h + tl.cast(first_row, tl.int64) * grad_stride_l
        row_max_ptr = stats_ptr + head * 2 * queries
        q = load_tile(q_ptr + q_offsets, inside, valid, True, BLOCK_D != HEAD_DIM)
        grad = load_tile(grad_row_ptr + grad_offsets, inside, valid, True, BLOCK_D != HEAD_DIM)
        delta = tl.load(delta_ptr + head * queries + rows, mask=inside, other=0.0)
        log_sum = tl.load(row_max_ptr + queries + rows, mask=inside, other=float("inf"))
        scores = dot(k, tl.trans(q), zeros) * qk_scale
        if BOUNDED:
            allowed = present[:, None]
            if CAUSAL:
                own = (rows + own_offset)[None, :]
                last_seen = (own & -GROUP) - 1 if QUANTIZE else own
                allowed = allowed & (key[:, None] <= last_seen)
                if OPEN:
                    allowed = allowed & (key[:, None] >= (own & -GROUP))
            scores = tl.where(allowed, scores, float("-inf"))
        if QUANTIZE:
            row_max = tl.load(row_max_ptr + rows, mask=inside, other=float("inf"))
            norm = tl.where(row_max == float("inf"), 0.0, tl.exp2(row_max - log_sum))  # 1 / l
            weights = tl.exp2(scores - row_max[None, :])
            code, group_scale = quantize_weights(weights, 0)
            quantized = code * (group_scale * (norm * (1.0 / P_GAIN))[None, None, :])
            contributing = tl.reshape(quantized, (k.shape[0], BLOCK_M))
            weights *= norm[None, :]
        else:
            weights = tl.exp2(scores - log_sum[None, :])
            contributing = weights
        grad_value = dot(narrow(contributing, grad.dtype), grad, grad_value)
        grad_scores = weights * (dot(v, tl.trans(grad), zeros) - delta[None, :])
        grad_key = dot(narrow(grad_scores, q.dtype), q, grad_key)
    return grad_key, grad_value


@triton.jit
def _key_tile(
    start_key,
    qf_ptr, kf_ptr, vf_ptr, v_ptr, mask_ptr, grad_ptr, delta_ptr, stats_ptr, grad_key_ptr, grad_value_ptr,
    v_stride_l, v_stride_d, grad_stride_h, grad_stride_l, grad_stride_d,
    first_head, query_heads, queries, keys, own_offset, qk_scale, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, QUANTIZE: tl.constexpr, OPEN: tl.constexpr, SINK: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys, summed over the query heads that share them.

    With QUANTIZE the queries behind the keys' groups see PF and VF; with OPEN, those of the same group see P and V.
    """
    key = start_key + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    valid = columns < HEAD_DIM
    present = key < keys
    if MASKED:
        present = present & (tl.load(mask_ptr + key, mask=present, other=0) != 0)
    first_key = tl.cast(start_key, tl.int64)
    tile = tl.arange(0, BLOCK_N)
    kv_offsets = tile[:, None] * HEAD_DIM + columns[None, :]
    v_offsets = tile[:, None] * v_stride_l + columns[None, :] * v_stride_d
    k = load_tile(kf_ptr + first_key * HEAD_DIM + kv_offsets, present, valid, True, BLOCK_D != HEAD_DIM)
    if QUANTIZE:
        v = load_tile(vf_ptr + first_key * HEAD_DIM + kv_offsets, present, valid, True, BLOCK_D != HEAD_DIM)
    else:
        v = load_tile(v_ptr + first_key * v_stride_l + v_offsets, present, valid, True, BLOCK_D != HEAD_DIM)

    # Queries in [begin, full) see some of the keys, those from `full` on see all of them.
    begin = 0
    full = 0
    if CAUSAL and QUANTIZE:
        begin = tl.maximum(start_key + GROUP - own_offset, 0)
        full = start_key + BLOCK_N - own_offset
    elif CAUSAL:
        begin = tl.maximum(start_key - own_offset, 0)
        full = start_key + BLOCK_N - 1 - own_offset
    UNBOUNDED: tl.constexpr = not (MASKED or SINK)
    if UNBOUNDED:
        full = tl.where(keys < start_key + BLOCK_N, queries, full)  # a last, shorter tile is bounded for everyone
        full = begin + tl.cdiv(tl.maximum(full - begin, 0), BLOCK_M) * BLOCK_M
    else:
        full = queries

    grad_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_value = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_key, grad_value = _sum_grad_key_value(
        grad_key, grad_value,
        k, v, key, present, qf_ptr, grad_ptr, grad_stride_h, grad_stride_l, grad_stride_d, delta_ptr, stats_ptr,
        first_head, query_heads, queries, own_offset, begin, tl.minimum(full, queries), qk_scale,
        HEAD_DIM, BLOCK_D, BLOCK_M, CAUSAL, True, False, QUANTIZE,
    )  # fmt: skip
    if UNBOUNDED:
        grad_key, grad_value = _sum_grad_key_value(
            grad_key, grad_value,
            k, v, key, present, qf_ptr, grad_ptr, grad_stride_h, grad_stride_l, grad_stride_d, delta_ptr, stats_ptr,
            first_head, query_heads, queries, own_offset, full, queries, qk_scale,
            HEAD_DIM, BLOCK_D, BLOCK_M, CAUSAL, False, False, QUANTIZE,
        )  # fmt: skip
    if OPEN:
        v = load_tile(v_ptr + first_key * v_stride_l + v_offsets, present, valid, True, BLOCK_D != HEAD_DIM)
        open_start = tl.maximum(start_key - own_offset, 0)
        open_stop = tl.minimum(start_key + BLOCK_N - own_offset, queries)
        grad_key, grad_value = _sum_grad_key_value(
            grad_key, grad_value,
            k, v, key, present, qf_ptr, grad_ptr, grad_stride_h, grad_stride_l, grad_stride_d, delta_ptr, stats_ptr,
            first_head, query_heads, queries, own_offset, open_start, open_stop, qk_scale,
            HEAD_DIM, BLOCK_D, BLOCK_M, CAUSAL, True, True, False,
        )  # fmt: skip

    grad_key *= scale
    if ROTATE:
        grad_key = hadamard(grad_key, BLOCK_N, BLOCK_D)
    where = present[:, None] & valid[None, :]  # excluded keys keep the zeros that the buffers hold
    grad_key_ptr += first_key * HEAD_DIM
    grad_value_ptr += first_key * HEAD_DIM
    tl.store(grad_key_ptr + kv_offsets, narrow(grad_key, grad_key_ptr.dtype.element_ty), mask=where)
    tl.store(grad_value_ptr + kv_offsets, narrow(grad_value, grad_value_ptr.dtype.element_ty), mask=where)


@triton.jit
def grad_key_value_kernel(
    qf_ptr, kf_ptr, vf_ptr, v_ptr, mask_ptr, first_ptr, grad_ptr, delta_ptr, stats_ptr, grad_key_ptr, grad_value_ptr,
    v_stride_b, v_stride_h, v_stride_l, v_stride_d,
    grad_stride_b, grad_stride_h, grad_stride_l, grad_stride_d,
    heads, key_heads, queries, all_keys, tiles, qk_scale, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, QUANTIZE: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one key head; layouts as in `grad_query_kernel`.

    Where groups are kept, tile 0 is the sink group, 16 keys for all of whose queries P and V are not quantized, and the
    tiles after it have BLOCK_N keys. Keys before the first allowed one, and excluded ones, are not written.
    """
    row_of_heads, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, key_head = (row_of_heads // key_heads).to(tl.int64), (row_of_heads % key_heads).to(tl.int64)
    first = 0
    if MASKED:
        first = tl.load(first_ptr + batch)
        mask_ptr += batch * all_keys + first
    keys = all_keys - first
    own_offset = keys - queries
    kv_offset = (row_of_heads.to(tl.int64) * all_keys + first) * HEAD_DIM
    kf_ptr += kv_offset
    if QUANTIZE:
        vf_ptr += kv_offset
    grad_key_ptr += kv_offset
    grad_value_ptr += kv_offset
    v_ptr += batch * v_stride_b + key_head * v_stride_h + tl.cast(first, tl.int64) * v_stride_l
    qf_ptr += batch * heads * queries * HEAD_DIM
    delta_ptr += batch * heads * queries
    stats_ptr += batch * heads * 2 * queries
    grad_ptr += batch * grad_stride_b
    query_heads = heads // key_heads
    first_head = (row_of_heads % key_heads) * query_heads

    if CAUSAL and QUANTIZE:
        if tile == 0:
            _key_tile(
                tile,  # starts at key 0
                qf_ptr, kf_ptr, vf_ptr, v_ptr, mask_ptr, grad_ptr, delta_ptr, stats_ptr, grad_key_ptr, grad_value_ptr,
                v_stride_l, v_stride_d, grad_stride_h, grad_stride_l, grad_stride_d,
                first_head, query_heads, queries, keys, own_offset, qk_scale, scale,
                HEAD_DIM, BLOCK_D, BLOCK_M, GROUP, True, MASKED, False, False, True, ROTATE,
            )  # fmt: skip
        else:
            _key_tile(
                (tile - 1) * BLOCK_N + GROUP,
                qf_ptr, kf_ptr, vf_ptr, v_ptr, mask_ptr, grad_ptr, delta_ptr, stats_ptr, grad_key_ptr, grad_value_ptr,
                v_stride_l, v_stride_d, grad_stride_h, grad_stride_l, grad_stride_d,
                first_head, query_heads, queries, keys, own_offset, qk_scale, scale,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, MASKED, True, True, False, ROTATE,
            )  # fmt: skip
    else:
        _key_tile(
            tile * BLOCK_N,
            qf_ptr, kf_ptr, vf_ptr, v_ptr, mask_ptr, grad_ptr, delta_ptr, stats_ptr, grad_key_ptr, grad_value_ptr,
            v_stride_l, v_stride_d, grad_stride_h, grad_stride_l, grad_stride_d,
            first_head, query_heads, queries, keys, own_offset, qk_scale, scale,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, MASKED, QUANTIZE, False, False, ROTATE,
        )  # fmt: skip
