"""Attention over the packed cache of cache.py in Triton: split over keys, then combined in a fixed order.

A program takes the query heads that share a key head as the rows of one tile, so the cache is read once for all of them.
The reference is eager.py; the layout of the cache is that of byte_layout.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qat_kernels.triton.nvfp4 import (
    GROUP,
    P_GLOBAL_SCALE,
    cast_rn,
    dot,
    fake_quantize_p,
    hadamard,
    round_groups,
    signed_values,
)
from qat_kernels.triton.scores import LOG2_E, add_key_bias

from .byte_layout import BLOCK_TOKENS
from .unpack import UNPACK_SCALE, load_rows, token_columns, unpack, unpack_tokens

LN_2 = tl.constexpr(0.6931471805599453)
BLOCK = tl.constexpr(BLOCK_TOKENS)
"""Tokens of a block of packed values."""
_EXPONENT_BITS = tl.constexpr(23)
"""The exponent of a float32 is above this many bits."""


@triton.jit
def _fake_quantize_q(
    x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTATE: tl.constexpr, FOUR_OVER_SIX: tl.constexpr
):  # fmt: skip
    """Q float32 [ROWS, COLUMNS], zero behind the head dim, fake-quantized: the bits are those of `quantize_rows`."""
    if ROTATE:
        x = hadamard(x, ROWS, COLUMNS)
        if HEAD_DIM < COLUMNS:  # a head dim of 16 is half of the tile; the other half of the product must be zero
            x = tl.where((tl.arange(0, COLUMNS) < HEAD_DIM)[None, :], x, 0.0)
    groups = tl.reshape(x, (ROWS, COLUMNS // GROUP, GROUP))
    magnitude, scale, finite = round_groups(groups, 2, FOUR_OVER_SIX)
    return tl.reshape(signed_values(groups, magnitude, scale, finite), (ROWS, COLUMNS))


@triton.jit
def _scale_to_float16(x):
    """Q float32 [R, C] as float16, and the factors that undo its scaling, float32 [R, 1].

    Each row is multiplied by a power of two that brings its largest value to 2^14 or just above.

    Values of bfloat16 and float16 stay exact, unless they are less than 2^-28 of the largest.
    """
    # Magnitudes have the same order as integers, and the maximum of integers keeps NaN, unlike that of floats.
    exponent = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1, keep_dims=True) >> _EXPONENT_BITS
    exponent = tl.minimum(tl.maximum(exponent, 15), 254)
    scale = ((268 - exponent) << _EXPONENT_BITS).to(tl.float32, bitcast=True)
    return (x * scale).to(tl.float16), ((exponent - 14) << _EXPONENT_BITS).to(tl.float32, bitcast=True)


@triton.jit
def _scores(k, q, key_bias, scale_log2, softcap, NEGATE: tl.constexpr):
    """Products of K [N, D] and Q [D, M], and the factors float32 [M] that make them scores times log2(e).

    K has the factor UNPACK_SCALE, and with NEGATE Q has the opposite sign. key_bias float32 [N] (or None), which is added, has
    neither.
    """
    scores = dot(k, q, tl.zeros((k.shape[0], q.shape[1]), tl.float32))
    if key_bias is not None:
        scores = add_key_bias(scores, (key_bias * (-UNPACK_SCALE if NEGATE else UNPACK_SCALE))[:, None])
    if softcap is not None:  # tanh(x) = 1 - 2 / (1 + e^2x)
        scores = (1.0 - 2.0 / (1.0 + tl.exp2(scores * (scale_log2 * (2.0 / softcap))[None, :]))) * (softcap * LOG2_E)
        scale_log2 = tl.full((q.shape[1],), 1.0, tl.float32)
    return scores, scale_log2


@triton.jit
def _online_softmax_step(scores, scores_max, scale_log2, row_max):
    """One step of the online softmax over axis 0 with ceiled maxima: P~, the factor for earlier sums, and the new maximum."""
    row_max_new = tl.maximum(row_max, tl.ceil(scores_max * scale_log2))
    row_max_safe = tl.where(row_max_new == float("-inf"), 0.0, row_max_new)
    p = tl.exp2(scores * scale_log2 - row_max_safe)
    return p, tl.exp2(row_max - row_max_safe), row_max_new, row_max_safe


@triton.jit
def _attend_kept(
    out, row_sum, row_max, q, q_pos, lower, start, stop,
    key_codes_ptr, key_scales_ptr, key_bias_ptr, ring, v_ptr, first_slot, ring_size, key_mask_ptr, scale_log2, softcap,
    HEAD_DIM: tl.constexpr, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, NEGATE: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    BEFORE_SM_89: tl.constexpr,
):  # fmt: skip
    """Unquantized P~ times unquantized V over the keys from `start` to `stop`; a query may see those from `lower` to `q_pos`.

    K of key j is row j % ring (None: row j), and V is row (j + first_slot) % ring_size.
    """
    columns = tl.arange(0, 32 * BLOCK_WORDS)
    for first_key in range(start, stop, GROUP):
        key = first_key + tl.arange(0, GROUP)
        present = key < stop
        if HAS_KEY_MASK:
            present = present & (tl.load(key_mask_ptr + key, mask=present, other=0) != 0)
        row = key
        if ring is not None:
            row = key % ring
        words = load_rows(key_codes_ptr, key_scales_ptr, row, present, WORDS, BLOCK_WORDS)
        key_bias = None
        if key_bias_ptr is not None:
            key_bias = tl.load(key_bias_ptr + row, mask=present, other=0.0)
        v_mask = present[:, None] & (columns < HEAD_DIM)[None, :]
        v_row = (key + first_slot) % ring_size
        v = tl.load(v_ptr + v_row[:, None] * HEAD_DIM + columns[None, :], mask=v_mask, other=0.0)
        scores, scale = _scores(unpack(*words, BEFORE_SM_89), q, key_bias, scale_log2, softcap, NEGATE)
        allowed = present[:, None] & (key[:, None] <= q_pos[None, :]) & (key[:, None] >= lower[None, :])
        scores = tl.where(allowed, scores, float("-inf"))
        p, rescale, row_max, _ = _online_softmax_step(scores, tl.max(scores, 0), scale, row_max)
        row_sum = row_sum * rescale + tl.sum(p, 0)
        out = dot(tl.trans(v), cast_rn(p, v.dtype), out * rescale[None, :])
    return out, row_sum, row_max


@triton.jit
def _attend_tile(
    out, sums, row_max, q, tile, cache, ring_tiles, key_mask_ptr, bounds, scale_log2, softcap,
    HEAD_DIM: tl.constexpr, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, BLOCK_N: tl.constexpr,
    NEGATE: tl.constexpr, KV_ONLY: tl.constexpr, HAS_KEY_MASK: tl.constexpr, BEFORE_SM_89: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """A tile of keys against all queries; BOUNDED: some queries do not see some of these keys."""
    GROUPS: tl.constexpr = BLOCK_N // GROUP
    key_codes_ptr, key_scales_ptr, key_bias_ptr, value_codes_ptr, value_scales_ptr = cache
    first, stop, lower, window_start = bounds
    columns = tl.arange(0, 32 * BLOCK_WORDS)
    in_tile = tl.arange(0, BLOCK_N)
    if not KV_ONLY:  # a thread has whole groups, one key in each of its rows
        in_tile = in_tile % GROUPS * GROUP + in_tile // GROUPS
    key = tile * BLOCK_N + in_tile
    present = (key >= first) & (key < stop)
    place = tile if ring_tiles is None else tile % ring_tiles
    k = load_rows(
        key_codes_ptr + place * (BLOCK_N * 16 * WORDS), key_scales_ptr + place * (BLOCK_N * 2 * WORDS), in_tile, None,
        WORDS, BLOCK_WORDS,
    )  # fmt: skip
    key_bias = None
    if key_bias_ptr is not None:
        key_bias = tl.load(key_bias_ptr + place * BLOCK_N + in_tile)
    scores, scale = _scores(unpack(*k, BEFORE_SM_89), q, key_bias, scale_log2, softcap, NEGATE)
    if BOUNDED:
        seen = present[:, None] & (key[:, None] < lower[None, :]) & (key[:, None] >= window_start[None, :])
        scores = tl.where(seen, scores, float("-inf"))
    if HAS_KEY_MASK:
        allowed = tl.load(key_mask_ptr + key, mask=present, other=0) if BOUNDED else tl.load(key_mask_ptr + key)
        scores = tl.where((allowed != 0)[:, None], scores, float("-inf"))
    scores = tl.reshape(scores, (GROUP, GROUPS, q.shape[1]))
    group_max = tl.max(scores, 0)
    p, rescale, row_max, row_max_safe = _online_softmax_step(scores, tl.max(group_max, 0), scale, row_max)
    sums = sums * rescale + tl.sum(p, 0)
    if KV_ONLY:
        # V is too small by UNPACK_SCALE; P~ is made too large by as much, and float16 holds more of the small ones.
        p = tl.reshape((p * (1.0 / UNPACK_SCALE)).to(tl.float16), (BLOCK_N, q.shape[1]))
        v = load_rows(
            value_codes_ptr + place * (BLOCK_N * 16 * WORDS), value_scales_ptr + place * (BLOCK_N * 2 * WORDS), in_tile,
            present if BOUNDED else None, WORDS, BLOCK_WORDS,
        )  # fmt: skip
        v = unpack_tokens(*v, BEFORE_SM_89)
    else:
        p = fake_quantize_p(p, tl.exp2(group_max * scale - row_max_safe)[None, :, :]).to(tl.float16)
        p = tl.reshape(tl.permute(p, (1, 0, 2)), (BLOCK_N, q.shape[1]))
        v = load_rows(  # one block of values is one tile
            value_codes_ptr + place * (BLOCK_N // 2 * HEAD_DIM), value_scales_ptr + place * (GROUPS * HEAD_DIM), columns,
            None if HEAD_DIM == 32 * BLOCK_WORDS else columns < HEAD_DIM, BLOCK_N // 32, BLOCK_N // 32,
        )  # fmt: skip
        v = unpack(*v, BEFORE_SM_89)
    return dot(v, p, out * rescale), sums, row_max


@triton.jit(
    do_not_specialize=[
        "stride_b", "stride_h", "stride_l", "num_heads_k", "qheads_per_kvhead", "seqlen_new", "length", "num_blocks", "ring_size",
        "num_splits", "early", "softmax_scale_log2", "k_shift_scale", "window", "softcap",
    ],
    do_not_specialize_on_alignment=["q_ptr", "k_shift_ptr", "q_shift_ptr", "key_mask_ptr"],
)  # fmt: skip
def split_kernel(
    q_ptr, k_shift_ptr, q_shift_ptr, key_mask_ptr, leftpad_ptr,
    key_codes_ptr, key_scales_ptr, key_bias_ptr, value_codes_ptr, value_scales_ptr, sink_ptr, recent_ptr, partials_ptr, lse_ptr,
    stride_b: tl.int64, stride_h: tl.int64, stride_l: tl.int64,
    num_heads_k, qheads_per_kvhead, seqlen_new, length, num_blocks, ring_size, num_splits, early,
    softmax_scale_log2, k_shift_scale, window, softcap,
    HEAD_DIM: tl.constexpr, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NEGATE: tl.constexpr, HAS_LEFTPAD: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_K_SHIFT: tl.constexpr, ROTATE: tl.constexpr,
    FOUR_OVER_SIX: tl.constexpr, KV_ONLY: tl.constexpr, BEFORE_SM_89: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows (query heads of one key head, times new tokens) against a part of the keys. The last part is the kept groups.

    KV_ONLY: V is stored as K is, Q and P~ are not quantized, and there are no kept groups, so the last part is like the others.

    q [B, H, n, D] of any strides but the last, which is 1; k_shift and q_shift float32 [Hk, D] (q_shift None: there is no key
    bias); the cache as in `KVCache`, keys and values counted from `leftpad` int32 [B] (not HAS_LEFTPAD: 0), with room for
    `num_blocks` blocks of values and V of the last slots in a ring; key_mask uint8 [B, length] over slots. partials float32: for
    each part of each head [B, Hk, num_parts], out [rows, D] before the division; after all of these, [2, rows] for each: m and
    the sum of P~. lse float32 [B, H, n]: if HAS_K_SHIFT, what the shift takes from it. NEGATE: the scale is negative.
    window: how many keys a row sees (None: all before it). Then the parts cover only the tiles in a window, and the cache is a
    ring: token j is in place j % (num_blocks * BLOCK). softcap: a number, or None.

    DEPENDENT: this kernel begins while `append_kernel` still runs. `early`: the parts of complete groups do not read what that
    kernel stores. They wait for it before they store, because it may still read memory that now belongs to them.
    """
    batch_head, split, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    batch, head_k = batch_head // num_heads_k, batch_head % num_heads_k
    if DEPENDENT:
        gdc_launch_dependents()
        if HAS_K_SHIFT or early == 0:
            gdc_wait()
    leftpad = 0
    if HAS_LEFTPAD:
        leftpad = tl.load(leftpad_ptr + batch)
    if HAS_KEY_MASK:
        key_mask_ptr += batch * length + leftpad
    seqlen_k = length - leftpad
    rows_of_head = qheads_per_kvhead * seqlen_new
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < rows_of_head
    columns = tl.arange(0, 32 * BLOCK_WORDS)
    valid = inside[:, None] & (columns < HEAD_DIM)[None, :]
    q_ptr += batch * stride_b + head_k * qheads_per_kvhead * stride_h
    q_rows = (rows // seqlen_new).to(tl.int64) * stride_h + (rows % seqlen_new).to(tl.int64) * stride_l
    q = tl.load(q_ptr + q_rows[:, None] + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    if HAS_K_SHIFT and split == num_splits:
        k_shift = tl.load(k_shift_ptr + head_k * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)
        tl.store(lse_ptr + batch_head * rows_of_head + rows, tl.sum(q * k_shift[None, :], 1) * k_shift_scale, mask=inside)
    if q_shift_ptr is not None:
        q -= tl.load(q_shift_ptr + head_k * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)[None, :]
    q = -q if NEGATE else q
    q_pos = seqlen_k - seqlen_new + rows % seqlen_new
    window_start = tl.zeros_like(q_pos)
    first_seen, last_start = 0, 0  # of the first and the last query
    if window is not None:
        window_start = tl.maximum(q_pos - (window - 1), 0)
        first_seen = tl.maximum(seqlen_k - seqlen_new - (window - 1), 0)
        last_start = tl.maximum(seqlen_k - window, 0)
    capacity = num_blocks * BLOCK
    key_codes_ptr += batch_head * capacity * (16 * WORDS)
    key_scales_ptr += batch_head * capacity * (2 * WORDS)
    if key_bias_ptr is not None:
        key_bias_ptr += batch_head * capacity
    score_scale = tl.full((BLOCK_M,), softmax_scale_log2 / UNPACK_SCALE, tl.float32)
    if KV_ONLY:
        q, undo = _scale_to_float16(q)
        score_scale = tl.reshape(undo, (BLOCK_M,)) * score_scale
        value_codes_ptr += batch_head * capacity * (16 * WORDS)
        value_scales_ptr += batch_head * capacity * (2 * WORDS)
        num_parts = num_splits
        first, stop = 0, seqlen_k
        lower = q_pos + 1
        seen_by_all = seqlen_k - seqlen_new + 1
    else:
        q = _fake_quantize_q(q, BLOCK_M, 32 * BLOCK_WORDS, HEAD_DIM, ROTATE, FOUR_OVER_SIX).to(tl.float16)
        value_codes_ptr += batch_head * capacity * (HEAD_DIM // 2)
        value_scales_ptr += batch_head * capacity * (HEAD_DIM // GROUP)
        num_parts = num_splits + 1
        first, stop = GROUP, tl.maximum((seqlen_k - 1) & -GROUP, 0)  # the complete groups but the first
        lower = q_pos & -GROUP
        seen_by_all = (seqlen_k - seqlen_new) & -GROUP
    score_scale = tl.maximum(score_scale, 1e-37)  # -inf times 0 would be NaN
    q = tl.trans(q)

    out = tl.zeros((32 * BLOCK_WORDS, BLOCK_M), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if split < num_splits:
        sums = tl.zeros((BLOCK_N // GROUP, BLOCK_M), tl.float32)
        first = tl.maximum(first, first_seen)
        first_tile = first_seen // BLOCK_N
        tiles = tl.cdiv(stop, BLOCK_N)
        part = tl.cdiv(tiles - first_tile, num_splits)
        start = first_tile + split * part
        end = tl.minimum(start + part, tiles)
        # Tiles that every query sees as a whole, and the others.
        whole_start = tl.minimum(tl.maximum(start, tl.cdiv(tl.maximum(first, last_start), BLOCK_N)), end)
        whole_end = tl.maximum(tl.minimum(end, tl.minimum(stop, seen_by_all) // BLOCK_N), whole_start)
        cache = (key_codes_ptr, key_scales_ptr, key_bias_ptr, value_codes_ptr, value_scales_ptr)
        ring_tiles = None if window is None else capacity // BLOCK_N
        bounds = (first, stop, lower, window_start)
        for tile in range(whole_start, whole_end):
            out, sums, row_max = _attend_tile(
                out, sums, row_max, q, tile, cache, ring_tiles, key_mask_ptr, bounds, score_scale, softcap,
                HEAD_DIM, WORDS, BLOCK_WORDS, BLOCK_N, NEGATE, KV_ONLY, HAS_KEY_MASK, BEFORE_SM_89, False,
            )  # fmt: skip
        for i in range(end - start - (whole_end - whole_start)):
            tile = start + i
            tile = tl.where(tile < whole_start, tile, tile + whole_end - whole_start)
            out, sums, row_max = _attend_tile(
                out, sums, row_max, q, tile, cache, ring_tiles, key_mask_ptr, bounds, score_scale, softcap,
                HEAD_DIM, WORDS, BLOCK_WORDS, BLOCK_N, NEGATE, KV_ONLY, HAS_KEY_MASK, BEFORE_SM_89, True,
            )  # fmt: skip
        row_sum = tl.sum(sums, 0)
        if not KV_ONLY:
            out = out * (1.0 / (P_GLOBAL_SCALE * UNPACK_SCALE))
    elif not KV_ONLY:
        if DEPENDENT:
            gdc_wait()
        ring = None if window is None else capacity
        sink_stop = tl.minimum(seqlen_k, GROUP)
        if window is not None:
            sink_stop = tl.where(first_seen < GROUP, sink_stop, 0)
        out, row_sum, row_max = _attend_kept(
            out, row_sum, row_max, q, q_pos, window_start, 0, sink_stop, key_codes_ptr, key_scales_ptr, key_bias_ptr, ring,
            sink_ptr + batch_head * GROUP * HEAD_DIM, 0, GROUP, key_mask_ptr, score_scale, softcap,
            HEAD_DIM, WORDS, BLOCK_WORDS, NEGATE, HAS_KEY_MASK, BEFORE_SM_89,
        )  # fmt: skip
        open_start = tl.maximum((seqlen_k - seqlen_new) & -GROUP, GROUP)
        if window is not None:
            lower = tl.maximum(lower, window_start)
        out, row_sum, row_max = _attend_kept(
            out, row_sum, row_max, q, q_pos, lower, open_start, seqlen_k, key_codes_ptr, key_scales_ptr, key_bias_ptr, ring,
            recent_ptr + batch_head * ring_size * HEAD_DIM, leftpad, ring_size, key_mask_ptr, score_scale, softcap,
            HEAD_DIM, WORDS, BLOCK_WORDS, NEGATE, HAS_KEY_MASK, BEFORE_SM_89,
        )  # fmt: skip
    if KV_ONLY:
        columns = token_columns(BLOCK_WORDS)
    valid = (columns < HEAD_DIM)[:, None] & inside[None, :]
    offsets = columns[:, None] + rows[None, :] * HEAD_DIM
    part = batch_head * num_parts + split
    if DEPENDENT:
        gdc_wait()
    tl.store(partials_ptr + part * rows_of_head * HEAD_DIM + offsets, out, mask=valid)
    all_rows = tl.num_programs(0).to(tl.int64) * num_parts * rows_of_head
    stats_ptr = partials_ptr + all_rows * HEAD_DIM + part * 2 * rows_of_head + rows
    tl.store(stats_ptr, row_max, mask=inside)
    tl.store(stats_ptr + rows_of_head, row_sum, mask=inside)


@triton.jit(
    do_not_specialize=["stride_b", "stride_h", "stride_l", "num_heads_k", "qheads_per_kvhead", "seqlen_new", "num_parts"],
    do_not_specialize_on_alignment=["sinks_ptr"],
)
def combine_kernel(
    partials_ptr, out_ptr, lse_ptr, sinks_ptr,
    stride_b: tl.int64, stride_h: tl.int64, stride_l: tl.int64, num_heads_k, qheads_per_kvhead, seqlen_new, num_parts,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, HAS_K_SHIFT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Adds the parts of one row of `split_kernel` in order. out [B, H, n, D] of any strides but the last; sinks [H] or None."""
    if DEPENDENT:
        gdc_wait()
    rows_of_head = qheads_per_kvhead * seqlen_new
    row = tl.program_id(0) % rows_of_head
    batch_head = (tl.program_id(0) // rows_of_head).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    valid = columns < HEAD_DIM
    all_rows = tl.num_programs(0).to(tl.int64) * num_parts
    stats_ptr = partials_ptr + all_rows * HEAD_DIM + batch_head * num_parts * 2 * rows_of_head + row
    partials_ptr += (batch_head * num_parts * rows_of_head + row) * HEAD_DIM
    out = tl.zeros((BLOCK_D,), tl.float32)
    row_sum, row_max = 0.0, float("-inf")
    for start in range(0, num_parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        present = part < num_parts
        part_max = tl.load(stats_ptr + part * (2 * rows_of_head), mask=present, other=float("-inf"))
        part_sum = tl.load(stats_ptr + part * (2 * rows_of_head) + rows_of_head, mask=present, other=0.0)
        offsets = (part * rows_of_head)[:, None] * HEAD_DIM + columns[None, :]
        part_out = tl.load(partials_ptr + offsets, mask=present[:, None] & valid[None, :], other=0.0)
        row_max_new = tl.maximum(row_max, tl.max(part_max, 0))
        row_max_safe = tl.where(row_max_new == float("-inf"), 0.0, row_max_new)
        part_rescale = tl.exp2(part_max - row_max_safe)  # powers of two: exact
        rescale = tl.exp2(row_max - row_max_safe)
        out = out * rescale + tl.sum(part_out * part_rescale[:, None], 0)
        row_sum = row_sum * rescale + tl.sum(part_sum * part_rescale, 0)
        row_max = row_max_new
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + (batch_head % num_heads_k) * qheads_per_kvhead + row // seqlen_new).to(tl.float32) * LOG2_E
        row_max_new = tl.maximum(row_max, tl.ceil(sink))
        rescale = tl.exp2(row_max - row_max_new)
        out *= rescale
        row_sum = row_sum * rescale + tl.exp2(sink - row_max_new)
        row_max = row_max_new
    empty = row_sum == 0.0
    lse = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2)
    lse_ptr += tl.program_id(0)  # rows of [B, H, n] are in the same order
    if HAS_K_SHIFT:
        lse += tl.load(lse_ptr)
    tl.store(lse_ptr, lse)
    out = cast_rn(out / tl.where(empty, 1.0, row_sum), out_ptr.dtype.element_ty)
    query_head = (batch_head % num_heads_k) * qheads_per_kvhead + row // seqlen_new
    out_ptr += batch_head // num_heads_k * stride_b + query_head * stride_h + (row % seqlen_new).to(tl.int64) * stride_l
    tl.store(out_ptr + columns, out, mask=valid)
